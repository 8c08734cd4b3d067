// Dropping a folder, class folders or an archive: sent with its progress shown, a folder as a zip made meanwhile.

import { makeZip, predictLength } from "./vendor/client-zip-2.5.1.js";
import "./vendor/tus-4.3.1.min.js"; // is `tus` from here on

// Of a zip that is made here, so much is in memory at a time, and once more while the next is filled.
const PIECE_BYTES = 8 * 2 ** 20;
const ARCHIVE = /\.(zip|tar|tar\.gz|tgz)$/i;
const percent = new Intl.NumberFormat("en", { style: "percent" });
const bytes = (count) => (count < 1e9 ? `${(count / 1e6).toFixed(1)} MB` : `${(count / 1e9).toFixed(2)} GB`);

for (const zone of document.querySelectorAll("[data-upload]")) prepare(zone);

function prepare(zone) {
  zone.addEventListener("dragover", (event) => {
    event.preventDefault();
    zone.classList.add("over");
  });
  zone.addEventListener("dragleave", (event) => {
    if (!zone.contains(event.relatedTarget)) zone.classList.remove("over");
  });
  zone.addEventListener("drop", (event) => {
    event.preventDefault();
    zone.classList.remove("over");
    begin(zone, dropped(event.dataTransfer));
  });
  zone.querySelector("[data-folder]").addEventListener("change", (event) => {
    begin(zone, [...event.target.files].map((file) => ({ path: file.webkitRelativePath || file.name, file })));
  });
  zone.querySelector("[data-archive]").addEventListener("change", (event) => {
    begin(zone, [...event.target.files].map((file) => ({ path: file.name, file })));
  });
}
// A drop beside the zone would make the browser open the file and leave the page.
for (const kind of ["dragover", "drop"]) window.addEventListener(kind, (event) => event.preventDefault());

// The entries have to be asked for before the event ends; what is in the folders may be read later.
function dropped(transfer) {
  const items = [...transfer.items].filter((item) => item.kind === "file");
  const found = items.map((item) => item.webkitGetAsEntry?.() ?? item.getAsFile());
  return (async () => (await Promise.all(found.filter(Boolean).map(within))).flat())();
}

async function within(entry) {
  if (entry instanceof File) return [{ path: entry.name, file: entry }];
  if (entry.isFile) {
    const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
    return [{ path: entry.fullPath.replace(/^\//, ""), file }];
  }
  const reader = entry.createReader();
  const found = [];
  // Chromium gives a hundred at a time, and none at the end.
  for (;;) {
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!some.length) break;
    for (const each of some) found.push(...(await within(each)));
  }
  return found;
}

async function begin(zone, gathering) {
  const sending = zone.querySelector(".sending");
  const problem = zone.querySelector(".problem");
  const bar = sending.querySelector("progress");
  const say = (text) => (sending.querySelector("[role=status]").textContent = text);
  const stop = new AbortController();
  sending.querySelector("[data-abort]").onclick = () => stop.abort();
  const stay = (event) => event.preventDefault();
  window.addEventListener("beforeunload", stay);
  problem.hidden = true;
  sending.hidden = false;
  zone.setAttribute("aria-busy", "true");
  try {
    say("Looking through the folder …");
    bar.removeAttribute("value");
    const files = (await gathering).filter(({ path }) => !path.split("/").some((part) => part.startsWith(".")));
    if (!files.length) throw new Error("There is no file in it.");
    const { archive, name } = packed(files, stop.signal, (done, begin) => {
      say(`Going on at ${bytes(begin)}: the folder is read up to there, ${percent.format(done / begin)} …`);
    });
    const dataset = await sent(archive, described(zone, name), stop.signal, (done, total) => {
      bar.value = done / total;
      say(done < total ? `Sending: ${bytes(done)} of ${bytes(total)}` : "The server looks it through …");
      if (done === total) bar.removeAttribute("value");
    });
    window.removeEventListener("beforeunload", stay);
    location.assign(`/datasets/${dataset}`);
  } catch (error) {
    sending.hidden = true;
    if (!stop.signal.aborted) {
      problem.textContent = error.message;
      problem.hidden = false;
    }
  } finally {
    window.removeEventListener("beforeunload", stay);
    zone.removeAttribute("aria-busy");
    for (const input of zone.querySelectorAll("input[type=file]")) input.value = "";
  }
}

// An archive as it is; everything else as one.
function packed(files, signal, onPassed) {
  const [first] = files;
  if (files.length === 1 && ARCHIVE.test(first.path)) {
    return { archive: first.file, name: first.path.replace(ARCHIVE, "") };
  }
  const tops = new Set(files.map(({ path }) => path.split("/")[0]));
  return { archive: new FolderZip(files, signal, onPassed), name: tops.size === 1 ? [...tops][0] : "pictures" };
}

class Unreadable extends Error {}

// A zip of a folder's files, read from front to back as tus-js-client asks for it. The same files make the same bytes,
// so that it can begin anew and pass over what the server has, which has to be read all the same for the checksums.
class FolderZip {
  #files;
  #signal;
  #onPassed;
  #reader;
  #begin = Infinity; // of the last piece, which is kept: what was cut on its way is asked for again
  #piece = new Blob(); // Chromium sends one in a tenth of the time that an array takes
  #rest = new Uint8Array(); // read already, and behind it
  #path = "";

  constructor(files, signal, onPassed) {
    const inOrder = files.toSorted((one, other) => (one.path < other.path ? -1 : 1));
    this.#files = inOrder.map(({ path, file }) => ({ name: path, input: file, lastModified: file.lastModified }));
    this.#signal = signal;
    this.#onPassed = onPassed;
    this.size = Number(predictLength(this.#files));
    // Whether it is the same folder on another day; a zip has times as the clock on the wall shows them.
    const told = this.#files.map(({ name, input, lastModified }) => {
      return [name, input.size, lastModified, new Date(lastModified).getTimezoneOffset()].join("\0");
    });
    this.fingerprint = `graft-folder-${this.size}-${digest(told.join("\n"))}`;
  }

  async slice(begin, end) {
    if (begin < this.#begin) this.#beginAnew();
    const parts = [this.#piece.slice(begin - this.#begin)];
    let missing = Math.min(end, this.size) - begin - parts[0].size;
    let at = this.#begin + this.#piece.size;
    while (missing) {
      this.#signal.throwIfAborted();
      if (!this.#rest.length) this.#rest = await this.#read();
      const passed = Math.max(0, Math.min(begin - at, this.#rest.length));
      if (passed) this.#onPassed(at + passed, begin);
      const used = this.#rest.subarray(passed, passed + missing);
      parts.push(used);
      missing -= used.length;
      at += passed + used.length;
      this.#rest = this.#rest.subarray(passed + used.length);
    }
    [this.#begin, this.#piece] = [begin, new Blob(parts)];
    return { value: this.#piece, done: false };
  }

  close() {
    this.#reader?.cancel().catch(() => {}); // client-zip passes the reason on as an error
  }

  #beginAnew() {
    this.close();
    this.#reader = makeZip(this.#each()).getReader();
    [this.#begin, this.#piece, this.#rest] = [0, new Blob(), new Uint8Array()];
  }

  *#each() {
    for (const file of this.#files) {
      this.#path = file.name;
      yield file;
    }
  }

  async #read() {
    try {
      return (await this.#reader.read()).value;
    } catch {
      throw new Unreadable(`${this.#path} cannot be read, or was changed meanwhile. Drop the folder again.`);
    }
  }
}

// FNV-1a, twice: enough to tell one person's folders apart. Browsers have digests of their own over HTTPS alone.
function digest(text) {
  let [first, second] = [0x811c9dc5, 0x9e3779b9];
  for (let at = 0; at < text.length; at += 1) {
    first = Math.imul(first ^ text.charCodeAt(at), 0x01000193);
    second = Math.imul((second ^ text.charCodeAt(at)) + (second >>> 15), 0x01000193);
  }
  return `${first >>> 0}-${second >>> 0}`;
}

function described(zone, name) {
  const given = zone.querySelector("[name=name]").value.trim();
  const kind = zone.querySelector("[name=unlabelled]").checked ? "unlabelled" : "labelled";
  return { name: given || name, kind };
}

// In pieces, as far as the line is good; what was begun before, on this page or another day, goes on.
function sent(archive, metadata, signal, onSent) {
  const known = archive.fingerprint ?? ["graft-archive", archive.name, archive.size, archive.lastModified].join("-");
  return new Promise((resolve, reject) => {
    const upload = new tus.Upload(archive, {
      endpoint: new URL("/v1/uploads", location).href,
      metadata,
      // Of another name or kind it is another upload: what was begun would arrive as what it was begun as.
      fingerprint: async () => `${known}-${JSON.stringify(metadata)}`,
      removeFingerprintOnSuccess: true,
      retryDelays: [0, 1000, 2000, 4000, 8000, 15000, 30000],
      onShouldRetry: (error) => !isUnreadable(error) && mayBeOver(status(error)),
      onProgress: onSent,
      onSuccess: ({ lastResponse }) => resolve(lastResponse.getHeader("Graft-Dataset")),
      onError: (error) => reject(new Error(told(error))),
      ...(archive instanceof FolderZip && {
        chunkSize: PIECE_BYTES,
        fileReader: { openFile: async () => archive },
      }),
    });
    signal.addEventListener("abort", () => {
      upload.abort(true); // the server forgets what it has
      reject(new Error("Stopped."));
    });
    upload.findPreviousUploads().then(([last]) => {
      if (last) upload.resumeFromPreviousUpload(last);
      upload.start();
    }, reject);
  });
}

const status = (error) => error.originalResponse?.getStatus() ?? 0;
const mayBeOver = (status) => [0, 409, 423, 429].includes(status) || status >= 500;
const isUnreadable = (error) => error.causingError instanceof Unreadable;

function told(error) {
  if (isUnreadable(error)) return error.causingError.message;
  if (!status(error)) return "The connection broke. Drop the same again, and it goes on where it was.";
  try {
    return JSON.parse(error.originalResponse.getBody()).detail;
  } catch {
    return `The server answered ${status(error)}.`;
  }
}
