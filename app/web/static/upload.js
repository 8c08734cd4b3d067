// Dropping a folder, class folders or an archive: packed here if need be, and sent with its progress shown.

import { downloadZip } from "./vendor/client-zip-2.5.1.js";
import "./vendor/tus-4.3.1.min.js"; // is `tus` from here on

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
    const { archive, name } = await packed(files, stop.signal, (share) => {
      bar.value = share;
      say(`Packing ${files.length} files: ${percent.format(share)}`);
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

// An archive as it is; everything else as one, which the browser keeps on its disk when it is large.
async function packed(files, signal, onPacked) {
  const [first] = files;
  if (files.length === 1 && ARCHIVE.test(first.path)) {
    return { archive: first.file, name: first.path.replace(ARCHIVE, "") };
  }
  const tops = new Set(files.map(({ path }) => path.split("/")[0]));
  let count = 0;
  function* inputs() {
    for (const { path, file } of files) {
      signal.throwIfAborted();
      yield { name: path, input: file, lastModified: file.lastModified };
      count += 1;
      onPacked(count / files.length);
    }
  }
  const archive = await downloadZip(inputs()).blob();
  return { archive, name: tops.size === 1 ? [...tops][0] : "pictures" };
}

function described(zone, name) {
  const given = zone.querySelector("[name=name]").value.trim();
  const kind = zone.querySelector("[name=unlabelled]").checked ? "unlabelled" : "labelled";
  return { name: given || name, kind };
}

// In pieces, as far as the line is good; an archive that was begun before, on this page or another day, goes on.
function sent(archive, metadata, signal, onSent) {
  return new Promise((resolve, reject) => {
    const isFile = archive instanceof File; // what was packed here has no name and no date to be known by again
    const upload = new tus.Upload(archive, {
      endpoint: new URL("/v1/uploads", location).href,
      metadata,
      storeFingerprintForResuming: isFile,
      removeFingerprintOnSuccess: true,
      retryDelays: [0, 1000, 2000, 4000, 8000, 15000, 30000],
      onShouldRetry: (error) => [0, 409, 423].includes(status(error)) || status(error) >= 500,
      onProgress: onSent,
      onSuccess: ({ lastResponse }) => resolve(lastResponse.getHeader("Graft-Dataset")),
      onError: (error) => reject(new Error(told(error, isFile))),
    });
    signal.addEventListener("abort", () => {
      upload.abort(true); // the server forgets what it has
      reject(new Error("Stopped."));
    });
    const begun = isFile ? upload.findPreviousUploads() : Promise.resolve([]);
    begun.then(([last]) => {
      if (last) upload.resumeFromPreviousUpload(last);
      upload.start();
    }, reject);
  });
}

const status = (error) => error.originalResponse?.getStatus() ?? 0;

function told(error, isFile) {
  if (!status(error)) {
    return `The connection broke. ${isFile ? "Drop the same archive again, and it goes on where it was." : "Drop it again."}`;
  }
  try {
    return JSON.parse(error.originalResponse.getBody()).detail;
  } catch {
    return `The server answered ${status(error)}.`;
  }
}
