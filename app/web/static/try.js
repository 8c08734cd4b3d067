// A picture dropped, pasted, chosen or taken goes to the model; the answer comes back as it is drawn on the server.

const page = document.querySelector("[data-try]");
let form = page?.querySelector("aside form");
if (page) prepare();

function prepare() {
  const zone = page.querySelector(".drop");
  zone.addEventListener("dragover", (event) => {
    event.preventDefault();
    zone.classList.add("over");
  });
  zone.addEventListener("dragleave", () => zone.classList.remove("over"));
  zone.addEventListener("drop", (event) => {
    event.preventDefault();
    zone.classList.remove("over");
    ask([...event.dataTransfer.files]);
  });
  for (const kind of ["dragover", "drop"]) window.addEventListener(kind, (event) => event.preventDefault());
  window.addEventListener("paste", (event) => {
    if (event.clipboardData.files.length) ask([...event.clipboardData.files]);
  });
  page.querySelector("[data-pictures]").addEventListener("change", (event) => ask([...event.target.files]));
  page.querySelector("#answers").addEventListener("change", ({ target }) => {
    if (target.name === "task") target.form.elements.label.value = target.selectedOptions[0].dataset.label;
  });
  page.querySelector("[data-camera]").addEventListener("click", openCamera);
  prepareForm();
}

function prepareForm() {
  form.addEventListener("change", (event) => {
    const pictures = last;
    // A request that keeps them is waited for: broken off, it may have kept them all the same.
    if (event.target.name !== "model") keeping.then(() => pictures === last && ask(last));
  });
  prepareModel(form.elements.model);
}

// Its page follows when one was chosen. An arrow key chooses one at each press, so then it is Enter, or leaving the field.
function prepareModel(select) {
  const shown = select.value;
  let isByKey = false;
  let isFollowed = false;
  const follow = () => {
    if (isFollowed || select.value === shown) return;
    isFollowed = true;
    show(select.value);
  };
  select.addEventListener("pointerdown", () => (isByKey = false));
  select.addEventListener("keydown", ({ key }) => {
    isByKey = key !== "Enter";
    if (!isByKey) follow();
  });
  select.addEventListener("change", () => isByKey || follow());
  select.addEventListener("blur", follow);
}

// Pictures that another model has answered are asked about again; without any, its page is opened.
async function show(model) {
  const address = `/try?model=${encodeURIComponent(model)}`;
  if (!last.length) return location.assign(address);
  try {
    const text = await (await fetch(address)).text();
    const fresh = new DOMParser().parseFromString(text, "text/html").querySelector("[data-try] aside form");
    for (const { name, checked } of form.querySelectorAll("[type=checkbox]")) fresh.elements[name].checked = checked;
    const isInUse = form.contains(document.activeElement);
    form.replaceWith(fresh);
    form = fresh;
    history.replaceState(null, "", address);
    prepareForm();
    if (isInUse) form.elements.model.focus();
    ask([...last]); // as other ones: what was kept of them was another model's answer
  } catch {
    location.assign(address); // which says what is wrong
  }
}

let last = [];
let kept = []; // of the last pictures, each with what corrects its label, where the server keeps it
let keeping = Promise.resolve();
let asking = new AbortController();

async function ask(pictures) {
  if (!pictures.length) return;
  if (pictures !== last) kept = [];
  last = pictures;
  asking.abort();
  asking = new AbortController();
  const { signal } = asking;
  const say = (text) => (page.querySelector("[role=status]").textContent = text);
  const fields = new FormData(form);
  if (kept.length) fields.delete("store");
  let isKept = () => {};
  if (fields.has("store")) keeping = new Promise((resolve) => (isKept = resolve));
  for (const picture of pictures) fields.append("file", picture, picture.name || "picture");
  say("The model looks at it …");
  try {
    const response = await fetch("/try", { method: "POST", body: fields, headers: { "HX-Request": "true" }, signal });
    if (response.status === 401) return location.assign(`/sign-in?next=${encodeURIComponent(location.pathname)}`);
    const answers = page.querySelector("#answers");
    const isPage = response.headers.get("content-type").startsWith("text/html");
    if (isPage) answers.innerHTML = await response.text();
    else answers.textContent = (await response.json()).detail;
    for (const shown of answers.querySelectorAll("[data-preview]")) {
      shown.src = URL.createObjectURL(pictures[shown.dataset.preview]);
      shown.onload = () => URL.revokeObjectURL(shown.src);
      shown.onerror = () => shown.remove(); // what the server could not read either, most likely
    }
    window.htmx.process(answers);
    answers.querySelectorAll(".answer").forEach((answer, place) => {
      const fresh = answer.querySelector(".kept");
      if (fresh) kept[place] = fresh;
      else if (kept[place]) answer.querySelector(".told")?.append(kept[place]);
    });
    const labels = [...answers.querySelectorAll(".told h2")].map((heading) => heading.textContent.trim());
    say(labels.length ? `Answered: ${labels.join("; ")}` : "");
  } catch (error) {
    if (!signal.aborted) say("The server did not answer. Try again.");
  } finally {
    isKept();
    page.querySelector("[data-pictures]").value = "";
  }
}

async function openCamera() {
  const panel = page.querySelector(".camera");
  const video = panel.querySelector("video");
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch {
    page.querySelector("[role=status]").textContent = "There is no camera that this page may use.";
    return;
  }
  const shoot = panel.querySelector("[data-shoot]");
  const close = () => {
    stream.getTracks().forEach((track) => track.stop());
    panel.hidden = true;
  };
  panel.querySelector("[data-close]").onclick = close;
  shoot.onclick = () => {
    const canvas = document.createElement("canvas");
    canvas.width = video.videoWidth;
    canvas.height = video.videoHeight;
    canvas.getContext("2d").drawImage(video, 0, 0);
    canvas.toBlob((blob) => ask([new File([blob], "camera.jpg", { type: "image/jpeg" })]), "image/jpeg", 0.92);
    close();
  };
  shoot.disabled = true; // until there is something to take
  video.srcObject = stream;
  panel.hidden = false;
  await video.play();
  shoot.disabled = false;
}
