// From pictures to an answer, each call checked against the API's types.
import createClient from "openapi-fetch";
import type { components, paths } from "./graft-api.d.ts";

const graft = createClient<paths>({ baseUrl: "http://127.0.0.1:8000" });

export async function train(archive: Blob, name: string): Promise<components["schemas"]["Model"]> {
  const uploaded = await graft.PUT("/v1/datasets", {
    params: { query: { name, wait: 60 } },
    body: "", // OpenAPI's word for bytes; what is sent is the archive
    bodySerializer: () => archive,
    headers: { "Content-Type": "application/octet-stream" },
  });
  if (!uploaded.data) throw new Error(uploaded.error?.detail);
  const submitted = await graft.POST("/v1/jobs", { body: { dataset: uploaded.data.id, method: "auto" } });
  if (!submitted.data || !("status" in submitted.data)) throw new Error(submitted.error?.detail);
  let job: components["schemas"]["Job"] = submitted.data;
  while (job.status === "queued" || job.status === "running") {
    const asked = await graft.GET("/v1/jobs/{job_id}", { params: { path: { job_id: job.id }, query: { wait: 60 } } });
    if (!asked.data) throw new Error(asked.error?.detail);
    job = asked.data;
  }
  if (!job.model) throw new Error(String(job.error?.["detail"]));
  const found = await graft.GET("/v1/models/{model}", { params: { path: { model: job.model } } });
  if (!found.data) throw new Error(found.error?.detail);
  return found.data;
}

export async function label(picture: Blob): Promise<string> {
  const form = new FormData();
  form.append("file", picture, "picture.jpg");
  const answered = await graft.POST("/predict", {
    body: { file: [] }, // OpenAPI's word for it; what is sent is the form
    bodySerializer: () => form,
  });
  if (!answered.data) throw new Error(answered.error?.detail);
  const [found] = answered.data.predictions;
  if (!found || "error" in found) throw new Error(found?.error.detail);
  return found.label;
}
