"""From requests to tiles and a TokenPlan: images are tiled, prompts tokenised, and both combined in one plan.

A request is {"prompt": str, "images": [...], "video": frames}, whose prompt is used verbatim, with `<image>` (or
`<video>`) for each item; or {"messages": [...]} in OpenAI's format, rendered through the chat template. Uses numpy
only, not torch.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np

from llava_fast.errors import ImageError, PromptTooLongError, RequestError
from llava_fast.inputs.chat.rendering import ChatTemplate, Segment
from llava_fast.inputs.encoding import ORIGINAL_IMAGE_TOKEN, Encoder
from llava_fast.inputs.instructions import Instructions
from llava_fast.inputs.literal import Hidden, LiteralText
from llava_fast.inputs.options import VIDEO_FRAMES, ProcessorOptions
from llava_fast.inputs.pictures.headers import image_size
from llava_fast.inputs.pictures.reading import open_image, require_rgb
from llava_fast.inputs.pictures.tiles import UncutImages, make_tiles, plan_tiles, resized_first
from llava_fast.inputs.pictures.video import CONTAINERS, FrameRate, VideoTimes, each_frame, frame_count, video_times
from llava_fast.inputs.pictures.view import View
from llava_fast.inputs.plan.columns import MODALITY_IMAGE, MODALITY_VIDEO
from llava_fast.inputs.plan.length import RowCounts, count_rows
from llava_fast.inputs.plan.plan import Layout, Piece, TextPiece, VisualPiece, build_plan, encoded_rows, sequence_length
from llava_fast.inputs.prepared import Cut, Placeholder, Prepared
from llava_fast.inputs.repeated import with_repeated_images
from llava_fast.inputs.requests import Labels, render_request
from llava_fast.inputs.tiling.anyres import VisualGeometry, image_rows, image_views
from llava_fast.inputs.tiling.video import frame_views, video_rows

_PLACEHOLDER = re.compile(r"<image>|<video>")
_IMAGE_PLACEHOLDER = re.compile(r"<image>")


@dataclass(frozen=True)
class Processor(ProcessorOptions):
    """Turns images and text into a model's inputs; its options are those of ProcessorOptions.

    geometry        how images become tiles and rows.
    tokenizer       a transformers tokenizer.
    image_token_id  the image token; with ORIGINAL_IMAGE_TOKEN the text between placeholders is tokenised in chunks.
    template        the chat template for requests with messages.
    max_rows        the decoder's context length; longer prompts raise PromptTooLongError.
    vocabulary      rows of the decoder's embedding; tokens with larger ids raise RequestError.
    frames_per_video  frames of a video file that the checkpoint's processor takes, whatever `video_frames` says; None:
                    any number.
    instructions    what the connector reads of a request's text; None: nothing.
    repeats_images  whether a question without an image stands for one with the last question's (see inputs.repeated).
    images_before_bos  images at the start of a prompt precede the BOS token that the tokenizer adds, and the text after
                    them is tokenised as if it stood alone (BLIP-2).
    answer_start    the token with which the decoder of an encoder-decoder begins its answer: prompt and answer are then
                    tokenised apart, each with the tokenizer's end token; None: one decoder reads both.
    routes          the model's router reads the text of the whole prompt with each image.
    """

    geometry: VisualGeometry
    tokenizer: Any
    image_token_id: int
    template: ChatTemplate
    video_token_id: int | None = None
    max_rows: int | None = None
    vocabulary: int | None = None
    images_before_bos: bool = False
    answer_start: int | None = None
    frames_per_video: int | None = None
    instructions: Instructions | None = None
    repeats_images: bool = False
    routes: bool = False
    exif: bool = field(default=True, kw_only=True)
    video_frames: int = field(default=VIDEO_FRAMES, kw_only=True)

    @property
    def frames(self) -> int:
        """How many frames of a video file are used."""
        return self.frames_per_video or self.video_frames

    def with_options(self, options: ProcessorOptions) -> Processor:
        """This processor with other options; `exif`, `video_frames` and `video_fps` are kept if `options` has None."""
        chosen = {option.name: getattr(options, option.name) for option in fields(ProcessorOptions)}
        kept = ("exif", "video_frames", "video_fps")
        made = replace(self, **chosen | {name: getattr(self, name) for name in kept if chosen[name] is None})
        return made.with_frames(options.video_frames) if options.video_fps is None else made

    def with_frames(self, number: int | None) -> Processor:
        """This processor with `number` frames of a video file in place of any rate; None: unchanged."""
        return self if number is None else replace(self, video_frames=number, video_fps=None)

    def tiles(self, image: Any, alone: bool = True) -> np.ndarray:
        """uint8 tiles [tiles, 3, H, W] of one image (path, bytes, data URI, PIL image, uint8 array), base view first.
        alone: False for one of several images of a request. Raises ImageError."""
        pixels = self._open(image)
        return self._make(pixels, self._image_views(pixels, alone))

    def prepare(
        self,
        requests: Sequence[dict],
        labels: Labels = False,
        layout: Layout = "packed",
    ) -> Prepared:
        """Tiles and plan of a batch of requests. With `labels`, requests must have messages. Raises RequestError
        (naming the request by its index or "id") and ImageError."""
        tiles: list[Cut] = []
        sequences = []
        for number, request in enumerate(requests):
            try:
                sequences.append(self.pieces(self.outline(request, labels), tiles))
                self.check_length(sequences[-1])
            except (RequestError, ImageError) as error:
                name = request.get("id", number) if isinstance(request, dict) else number
                raise type(error)(f"request {name}: {error}") from None
        return self.assemble(sequences, tiles, layout)

    def assemble(
        self,
        sequences: list[list[Piece]],
        tiles: list[Cut],
        layout: Layout = "packed",
        first_positions: list[int] | None = None,
        branches: Sequence[Sequence[int]] = (),
    ) -> Prepared:
        """Combine the pieces of each sequence and their tiles to one batch. first_positions: the number of cached rows
        of each sequence; branches: the row counts of its branches (see inputs.plan). For a connector that reads text,
        the tiles of an image that occurs several times (the same object in `tiles`) are in the batch once."""
        plan = build_plan(sequences, self.geometry.tower_rows_per_tile, layout, first_positions, branches)
        if self.instructions is not None and len(distinct := {id(cut): cut for cut in tiles}) < len(tiles):
            arrays = [cut for cut in distinct.values() if not isinstance(cut, tuple)]
            if len(arrays) == len(distinct):
                ends = np.cumsum([len(cut) for cut in arrays])
                first = {key: end - len(cut) for (key, cut), end in zip(distinct.items(), ends, strict=True)}
                index = [np.arange(len(cut)) + first[id(cut)] for cut in tiles]
                plan = plan.with_columns({"tower_tile": np.concatenate(index).astype(np.int32)})
                tiles = list(distinct.values())
        return Prepared(self._joined(tiles), plan)

    def count(self, request: dict, labels: Labels = False) -> RowCounts:
        """The number of rows of a request, from its text and its files' headers. No pixels are decoded, so a truncated
        file is not detected. Raises RequestError and ImageError, but not for a request that is too long.
        """
        outline = self.outline(request, labels)
        return count_rows(outline, self.rows_of(outline))

    def rows_of(self, outline: Sequence[TextPiece | Placeholder]) -> list[int]:
        """Decoder rows of each part of an outline, from the headers of its files. Raises ImageError."""
        return [len(part.ids) if isinstance(part, TextPiece) else self._placeholder_rows(part) for part in outline]

    def _placeholder_rows(self, placeholder: Placeholder) -> int:
        try:
            if placeholder.kind == "<video>":
                frames = frame_count(placeholder.source, self._frames_of(placeholder.source), self._containers)
                return len(video_rows(self.geometry, frames))
            size = image_size(placeholder.source, self.exif)
        except TypeError as error:
            raise RequestError(str(error)) from error
        return len(image_rows(self.geometry, *size, placeholder.alone))

    @property
    def _containers(self) -> str | None:
        return None if self.formats is None else CONTAINERS

    def _frames_of(self, video: Any) -> int | FrameRate | None:
        """Which frames of a video are used; None: all, since the caller selected them."""
        from_file = isinstance(video, (str, os.PathLike, bytes, bytearray, memoryview))
        return self.chosen_frames if from_file else None

    @property
    def chosen_frames(self) -> int | FrameRate:
        """Which frames of a video file are used: their number or their rate."""
        return FrameRate(self.video_fps) if self.video_fps else self.frames

    def render(self, request: dict, labels: Labels = False) -> tuple[list[Segment], list, list]:
        """See `render_request`. The checkpoint's own image token also counts as a placeholder, as in its template."""
        times_of = self._times_of if self.time_instruction else None
        segments, images, videos = render_request(self.template, request, labels, times_of)
        if self.image_token_id != ORIGINAL_IMAGE_TOKEN:
            own = self.tokenizer.convert_ids_to_tokens(self.image_token_id)
            if own is None:
                raise RequestError(
                    f"the tokenizer has no token {self.image_token_id}, which config.json names as the image token: "
                    "its files belong to another model"
                )
            if own not in ("<image>", "<video>"):
                segments = [replace(each, text=each.text.replace(own, "<image>")) for each in segments]
        return segments, images, videos

    def _times_of(self, video: Any) -> VideoTimes:
        return video_times(video, self.chosen_frames, self._containers)

    def outline(self, request: dict, labels: Labels = False) -> list[TextPiece | Placeholder]:
        """A request as token ids and placeholders, before any image is opened; only a time instruction reads the
        video's header. Raises RequestError, also if labels are requested and no token would be supervised, and
        ImageError for a video without times."""
        if labels not in (False, True, "answers", "original"):
            raise ValueError(f"labels are False, True, 'answers' or 'original', not {labels!r}")
        if labels and "messages" not in request:
            raise RequestError('labels need "messages": a verbatim "prompt" does not define which part is the answer')
        copies = 1
        if self.repeats_images and self.image_turns == "every":
            request, copies = with_repeated_images(request, bool(self.literal_text))
        hidden, asked = None, request
        if self.literal_text and isinstance(request, dict):
            request, hidden = self.literal.hidden(request)
            if "prompt" in request and (request.get("images") or request.get("video") is not None):
                raise RequestError(
                    'with literal_text a "prompt" has no placeholders for images and videos: use "messages"'
                )
        segments, image_sources, video_sources = self.render(request, labels)
        video_sources = video_sources * copies
        text = "".join(segment.text for segment in segments)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the prompt has half a surrogate pair at character {error.start}: check how it was decoded"
            ) from None
        # Without a video, "<video>" is ordinary text, for example in a question about HTML.
        pattern = _PLACEHOLDER if video_sources or self.video_token_id is not None else _IMAGE_PLACEHOLDER
        placeholders = pattern.findall(text)
        for placeholder, sources in (("<image>", image_sources), ("<video>", video_sources)):
            if placeholders.count(placeholder) != len(sources):
                raise RequestError(
                    f"the prompt has {placeholders.count(placeholder)} {placeholder} placeholders and {len(sources)} "
                    f"were given: mark each one's place in the prompt with {placeholder}"
                )
        answer = None
        if self.answer_start is not None:
            segments, answer = self._parted(segments, labels, hidden)
        elif labels == "original":  # from here on, `supervised` is what the original trainers supervise
            segments = [replace(each, supervised=each.supervised_original) for each in segments]
        ids, supervised, places = self.encoder.encode(segments, pattern, bool(labels), "messages" in request, hidden)
        if labels == "original" and answer is None:
            supervised |= np.isin(ids, self._original_label_ids)
        if labels and not (supervised.any() if answer is None else len(answer.ids) > 1):
            raise RequestError("no token of the answers is supervised: this sample has nothing to learn from")
        if len(places) != len(placeholders):
            raise RequestError(
                f"the tokenizer found {len(places)} image tokens for {len(placeholders)} placeholders in the prompt"
            )

        instructions = None
        if self.instructions is not None and placeholders:
            instructions = self.instructions.of(asked, pattern, bool(self.literal_text))
        elif self.routes and placeholders:
            left_out = supervised.copy() if labels and self.router_text == "prompt" else np.zeros(len(ids), bool)
            left_out[places] = True
            instructions = [ids[~left_out]] * len(places)
        alone = len(image_sources) == 1 or self.geometry.multi_image_anyres
        queues = {"<image>": iter(image_sources), "<video>": iter(video_sources)}
        outline: list[TextPiece | Placeholder] = []
        start = 0
        for number, (placeholder, place) in enumerate(zip(placeholders, places, strict=True)):
            outline.append(TextPiece(ids[start:place], supervised[start:place] if labels else None))
            told = None if instructions is None else instructions[number]
            outline.append(Placeholder(placeholder, next(queues[placeholder]), alone, told))
            start = place + 1
        outline.append(TextPiece(ids[start:], supervised[start:] if labels else None))
        if answer is not None:
            outline.append(answer)
        self._check_ids(outline)
        return [piece for piece in outline if not isinstance(piece, TextPiece) or len(piece.ids)]

    def _parted(
        self, segments: list[Segment], labels: Labels, hidden: Hidden | None
    ) -> tuple[list[Segment], TextPiece]:
        """(the prompt, which an encoder reads; the answer, from the token with which the decoder begins). With labels,
        the last answer is supervised, and earlier ones are the prompt's. Raises RequestError for turns after it."""
        if not labels:
            return segments, TextPiece(np.array([self.answer_start], np.int32), begins_answer=True)
        last = max((number for number, segment in enumerate(segments) if segment.supervised), default=-1)
        if last < 0:
            raise RequestError("no token of the answers is supervised: this sample has nothing to learn from")
        if "".join(segment.text for segment in segments[last + 1 :]).strip():
            raise RequestError(
                "the sample has turns after its last answer, and this model's decoder answers what its encoder has "
                "read: leave them out, or answer them"
            )
        if labels == "original" and self.template.original_label_tokens:
            raise RequestError(
                f"labels='original' supervises tokens of the prompt with the template {self.template.name!r}, and this "
                "model's prompt is read by its encoder: use labels='answers'"
            )
        prompt = [replace(each, supervised=False, supervised_original=False) for each in segments[:last]]
        return prompt, self._answer(segments[last].text, hidden)

    def verbatim_answer(self, text: str) -> TextPiece:
        """A text as an encoder-decoder's answer, its tokens supervised but for `answer_start`. Raises RequestError."""
        self.outline({"prompt": text})  # raises for a placeholder and for a token without an embedding
        request, hidden = self.literal.hidden({"prompt": text}) if self.literal_text else ({"prompt": text}, None)
        return self._answer(request["prompt"], hidden)

    def _answer(self, text: str, hidden: Hidden | None) -> TextPiece:
        """The answer that the decoder of an encoder-decoder writes, tokenised alone, with the tokenizer's end token."""
        end, text = self.tokenizer.eos_token, text.strip()
        ids, _ = self.encoder.tokens(text.removesuffix(end).strip() if end else text, True, False, hidden)
        both = np.asarray([self.answer_start, *ids], np.int32)
        return TextPiece(both, np.arange(len(both)) > 0, begins_answer=True)

    def _check_ids(self, outline: Sequence[TextPiece | Placeholder]) -> None:
        """Raise RequestError for a token without an embedding in the decoder, for example if only the tokenizer was
        extended.
        """
        if self.vocabulary is None:
            return
        texts = [part.ids for part in outline if isinstance(part, TextPiece) and len(part.ids)]
        largest = max((int(ids.max()) for ids in texts), default=0)
        if largest >= self.vocabulary:
            raise RequestError(
                f"the token {self.tokenizer.convert_ids_to_tokens(largest)!r} has the id {largest}, and the model has "
                f"embeddings for {self.vocabulary} tokens: use the tokenizer with which the model was trained"
            )

    def pieces(self, outline: Sequence[TextPiece | Placeholder], tiles: list[Cut]) -> list[Piece]:
        """The pieces of a plan. Opens and cuts each placeholder's image and appends it to `tiles`; one that occurs
        again is appended again, but not opened. Raises ImageError."""
        pieces: list[Piece] = []
        known: dict[tuple[int, str, bool], tuple[VisualPiece, list[Cut]]] = {}
        for part in outline:
            if not isinstance(part, Placeholder):
                pieces.append(part)
                continue
            before = len(tiles)
            if part.origin in known:
                piece, cuts = known[part.origin]
                pieces.append(replace(piece, instruction=part.instruction))
                tiles += cuts
            else:
                made = self._visual_piece(part, tiles)
                pieces.append(made)
                known[part.origin] = made, tiles[before:]
        return pieces

    def _visual_piece(self, placeholder: Placeholder, tiles: list[Cut]) -> VisualPiece:
        if placeholder.kind == "<video>":
            frames = each_frame(placeholder.source, self._frames_of(placeholder.source), self._containers)
            try:
                cuts = [self._cut(frame, frame_views(self.geometry, *frame.shape[:2])) for frame in frames]
            except TypeError as error:
                raise RequestError(str(error)) from error
            tiles += cuts
            return VisualPiece(video_rows(self.geometry, len(cuts)), MODALITY_VIDEO, placeholder.instruction)
        try:
            image = self._open(placeholder.source)
        except TypeError as error:
            raise RequestError(str(error)) from error
        tiles.append(self._cut(image, self._image_views(image, placeholder.alone)))
        rows = image_rows(self.geometry, *image.shape[:2], placeholder.alone)
        return VisualPiece(rows, MODALITY_IMAGE, placeholder.instruction)

    def _image_views(self, image: np.ndarray, alone: bool) -> Sequence[View]:
        return image_views(self.geometry, *image.shape[:2], alone)

    def _cut(self, image: np.ndarray, views: Sequence[View]) -> Cut:
        if self.tiles_on == "device":
            return resized_first(image, views, pillow=self.pillow, threads=self.threads)
        return self._make(image, views)

    def _joined(self, tiles: list[Cut]) -> np.ndarray | UncutImages:
        """The tiles of a batch, or its images if the device makes the tiles."""
        size = self.geometry.tile_size
        uncut = [part for part in tiles if isinstance(part, tuple)]
        if uncut:
            sizes = [image.shape[:2] for image, _ in uncut]
            plan = plan_tiles(sizes, [views for _, views in uncut], size, pillow=self.pillow)
            return UncutImages(np.concatenate([image.ravel() for image, _ in uncut]), plan)
        made = [part for part in tiles if not isinstance(part, tuple)]
        return np.concatenate(made) if made else np.zeros((0, 3, size, size), np.uint8)

    def _open(self, source: Any) -> np.ndarray:
        """The pixels of an image. transformers drops transparency of files, and blends PIL images and arrays onto
        white;
        the original LLaVA always drops it."""
        given = not isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview))
        if given and not self.geometry.convert_rgb:
            require_rgb(source)
        alpha: Literal["drop", "white"] = "white" if given and self.exif else "drop"
        return open_image(source, self.exif, alpha, self.formats)

    def _make(self, image: np.ndarray, views: Sequence[View]) -> np.ndarray:
        return make_tiles(
            image,
            views,
            self.geometry.tile_size,
            pillow=self.pillow,
            resample=self.resample,
            threads=self.threads,
        )

    @functools.cached_property
    def encoder(self) -> Encoder:
        """Text to token ids."""
        return Encoder(self.tokenizer, self.image_token_id, self.video_token_id, self.images_before_bos)

    @property
    def literal(self) -> LiteralText:
        """The encoder for the option `literal_text`."""
        return self.encoder.literal

    @functools.cached_property
    def _original_label_ids(self) -> list[int]:
        """The ids of tokens that the original trainer supervises at any position. Texts that are not a single token are
        ignored, as in the original.
        """
        return self.encoder.single_tokens(self.template.original_label_tokens)

    def check_length(self, pieces: list[Piece]) -> None:
        """Raise RequestError for an empty sequence, PromptTooLongError for one that exceeds the decoder's context."""
        rows = sequence_length(pieces)
        if rows == 0 or (self.answer_start is not None and encoded_rows(pieces) == 0):
            raise RequestError("the prompt is empty: give some text or an image")
        if self.max_rows is not None and rows > self.max_rows:
            visual = sum(len(piece.rows) for piece in pieces if isinstance(piece, VisualPiece))
            raise PromptTooLongError(
                f"the prompt takes {rows} tokens ({visual} of them visual) and the model's context holds "
                f"{self.max_rows}: shorten the text, or use fewer or smaller images"
            )
