// Pictures and videos that the user has given.

export class Attachment {
  constructor(file) {
    this.file = file;
    this.name = file.name || "pasted picture";
    this.kind = file.type.startsWith("video/") ? "video" : "image";
    this.url = URL.createObjectURL(file); // for showing it here
    this.plan = null; // what the model sees of it: an item of /v1/llava_fast/plan
  }

  /** Its part of a message. The file goes to the server as it is: nothing is resized here. */
  async part() {
    this.uri ??= await dataUri(this.file);
    const type = `${this.kind}_url`;
    return { type, [type]: { url: this.uri } };
  }

  get bytes() {
    return Math.ceil(this.file.size / 3) * 4; // in base64
  }

  /** An element that shows it: a small picture, or its name where the browser cannot. */
  thumbnail() {
    const shown = document.createElement(this.kind === "video" ? "video" : "img");
    shown.src = this.url;
    if (this.kind === "video") {
      Object.assign(shown, { muted: true, preload: "metadata" });
      shown.setAttribute("aria-label", this.name);
    } else {
      shown.alt = this.name;
    }
    shown.addEventListener("error", () => {
      const name = document.createElement("span");
      name.textContent = this.name;
      shown.replaceWith(name);
    });
    return shown;
  }

  /** The pixels of the picture, or of the video at some seconds, to draw from; null where the browser cannot. */
  async pixels(seconds) {
    try {
      if (this.kind === "video") return await frameAt((this.video ??= await opened(this.url)), seconds ?? 0);
      this.bitmap ??= await createImageBitmap(this.file, {
        imageOrientation: this.plan?.oriented === false ? "none" : "from-image",
      });
      return this.bitmap;
    } catch {
      return null;
    }
  }

  close() {
    URL.revokeObjectURL(this.url);
    this.bitmap?.close();
  }
}

function dataUri(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} cannot be read: ${reader.error.message}`));
    reader.readAsDataURL(file);
  });
}

function opened(url) {
  return new Promise((resolve, reject) => {
    const video = Object.assign(document.createElement("video"), { muted: true, preload: "auto" });
    video.onloadeddata = () => resolve(video);
    video.onerror = () => reject(new Error("the browser cannot show this video"));
    video.src = url;
  });
}

function frameAt(video, seconds) {
  return new Promise((resolve, reject) => {
    video.onseeked = () => resolve(video);
    video.onerror = () => reject(new Error("the browser cannot show this video"));
    video.currentTime = seconds + 0.001; // a frame's own time may round to the one before
  });
}
