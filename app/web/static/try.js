// A picture dropped, pasted, chosen or taken goes to the model; the answer comes back as it is drawn on the server.

const page = document.querySelector("[data-try]");
const form = page?.querySelector("aside form");
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
  form.addEventListener("change", (event) => {
    if (event.target.name === "model") location.assign(`/try?model=${encodeURIComponent(event.target.value)}`);
    else ask(last);
  });
  page.querySelector("[data-camera]").addEventListener("click", openCamera);
}

let last = [];
let asking = new AbortController();

async function ask(pictures) {
  if (!pictures.length) return;
  last = pictures;
  asking.abort();
  asking = new AbortController();
  const { signal } = asking;
  const say = (text) => (page.querySelector("[role=status]").textContent = text);
  const fields = new FormData(form);
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
    const labels = [...answers.querySelectorAll(".told h2")].map((heading) => heading.textContent.trim());
    say(labels.length ? `Answered: ${labels.join("; ")}` : "");
  } catch (error) {
    if (!signal.aborted) say("The server did not answer. Try again.");
  } finally {
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
