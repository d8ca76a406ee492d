// Talks to pressd with nothing but its .proto files: node stream.mjs ADDRESS PROTOS GOOGLEAPIS MODE
//
// PROTOS and GOOGLEAPIS are folders of .proto files. MODE is `whole`, which streams completions to their end, or `held`,
// for a server whose engine stands still, so that nothing ends by itself.

import assert from "node:assert/strict";
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

const [address, protos, googleapis, mode] = process.argv.slice(2);
const PATIENCE = 60_000; // milliseconds that nothing ever takes
const TEXT = "the ü of 漢字 and 👩‍🚀 €";
const SEED = "18446744073709551615"; // 2^64 - 1: no double holds it, hence `longs: String`

const definition = loader.loadSync(
  ["pressd/v1/inference.proto", "pressd/v1/control.proto", "google/rpc/status.proto", "google/rpc/error_details.proto"],
  { includeDirs: [protos, googleapis], keepCase: true, longs: String, enums: String, oneofs: true },
);
const { Inference, Control } = grpc.loadPackageDefinition(definition).pressd.v1;
const inference = new Inference(address, grpc.credentials.createInsecure());
const control = new Control(address, grpc.credentials.createInsecure());

const within = (milliseconds) => ({ deadline: Date.now() + milliseconds });

const ask = (client, method, request) =>
  new Promise((resolve, reject) => {
    client[method](request, within(PATIENCE), (error, answer) => (error ? reject(error) : resolve(answer)));
  });

// All events of a stream, and the error that ended it or null. `seen` is called with each event.
const collect = (call, seen = () => {}) =>
  new Promise((resolve) => {
    const events = [];
    call.on("data", (event) => {
      events.push(event);
      seen(event);
    });
    call.on("error", (error) => resolve({ events, error }));
    call.on("end", () => resolve({ events, error: null }));
  });

// The details of a failed call, by the names of their types.
const details = (error) => {
  const status = definition["google.rpc.Status"].deserialize(error.metadata.get("grpc-status-details-bin")[0]);
  assert.equal(status.code, error.code);
  assert.equal(status.message, error.details);
  const read = ({ type_url, value }) => [type_url.split("/")[1], definition[type_url.split("/")[1]].deserialize(value)];
  return Object.fromEntries(status.details.map(read));
};

async function whole() {
  const { models } = await ask(control, "ListModels", {});
  assert.deepEqual(models.map((model) => [model.name, model.state]), [["parrot", "MODEL_STATE_READY"]]);

  const { ids } = await ask(inference, "Tokenize", { text: TEXT });
  const request = { request_id: "from-node", prompt: TEXT, sampling: { seed: SEED }, output: { token_ids: true } };
  const { events, error } = await collect(inference.GenerateStream(request, within(PATIENCE)));
  assert.equal(error, null);
  const kinds = events.map(({ event }) => event);
  assert.deepEqual(kinds, ["accepted", ...Array(kinds.length - 2).fill("delta"), "finished"]);
  assert.ok(events.every(({ request_id }) => request_id === "from-node"));
  const deltas = events.slice(1, -1).map(({ delta }) => delta);
  const tokens = deltas.flatMap((delta) => delta.tokens);
  assert.equal(deltas.map(({ text }) => text).join(""), TEXT);
  assert.equal(tokens.map(({ text }) => text).join(""), TEXT);
  assert.deepEqual(tokens.map(({ id }) => id), ids);
  assert.equal(deltas.reduce((sum, { num_tokens }) => sum + num_tokens, 0), ids.length);
  const { accepted } = events[0];
  const { finished } = events.at(-1);
  assert.equal(accepted.seed, SEED);
  assert.deepEqual([finished.reason, finished.matched, finished.seed], ["FINISH_REASON_EOS", "eos_token_id", SEED]);
  assert.deepEqual([finished.usage.prompt_tokens, finished.usage.completion_tokens], [ids.length, ids.length]);

  const answer = await ask(inference, "Generate", { prompt: TEXT, stopping: { stop: ["字"] } });
  const [completion] = answer.completions;
  assert.equal(completion.text, TEXT.slice(0, TEXT.indexOf("字")));
  assert.deepEqual([completion.finished.reason, completion.finished.stop], ["FINISH_REASON_STOP", "字"]);

  const refused = await collect(
    inference.GenerateStream({ prompt: TEXT, sampling: { temperature: -1 } }, within(PATIENCE)),
  );
  assert.deepEqual([refused.events, refused.error?.code], [[], grpc.status.INVALID_ARGUMENT]);
  const found = details(refused.error);
  assert.deepEqual(
    [found["google.rpc.ErrorInfo"].reason, found["google.rpc.ErrorInfo"].domain],
    ["INVALID_FIELD", "pressd"],
  );
  assert.deepEqual(
    found["google.rpc.BadRequest"].field_violations.map(({ field }) => field),
    ["sampling.temperature"],
  );
}

async function held() {
  const late = await collect(inference.GenerateStream({ prompt: TEXT }, within(300)));
  assert.equal(late.error?.code, grpc.status.DEADLINE_EXCEEDED);

  const call = inference.GenerateStream({ prompt: TEXT }, within(PATIENCE));
  const dropped = await collect(call, () => call.cancel()); // accepted: now it is ours to drop
  assert.deepEqual(dropped.events.map(({ event }) => event), ["accepted"]);
  assert.equal(dropped.error?.code, grpc.status.CANCELLED);

  const ended = inference.GenerateStream({ request_id: "to-cancel", prompt: TEXT }, within(PATIENCE));
  const { events, error } = await collect(ended, async ({ event }) => {
    if (event === "accepted") await ask(inference, "Cancel", { request_id: "to-cancel" });
  });
  assert.equal(error, null);
  assert.equal(events.at(-1).finished.reason, "FINISH_REASON_CANCELLED");

  await assert.rejects(ask(inference, "Cancel", { request_id: "nobody" }), (error) => {
    assert.equal(details(error)["google.rpc.ErrorInfo"].reason, "REQUEST_NOT_FOUND");
    return error.code === grpc.status.NOT_FOUND;
  });
}

await { whole, held }[mode]();
inference.close();
control.close();
