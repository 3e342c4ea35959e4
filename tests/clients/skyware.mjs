// Reads everything up to a cursor with npm's client for Jetstreams, and prints what it saw.
import { Jetstream } from "@skyware/jetstream";
import WebSocket from "ws";

const [endpoint, last] = process.argv.slice(2);
const seen = { posts: 0, deleted: 0, identities: 0, accounts: 0, errors: 0 };
// All collections, so that the last message comes, whatever it is about. It takes 0 for no cursor.
const jetstream = new Jetstream({ ws: WebSocket, endpoint, cursor: 1 });
const stop = (event) => {
  if (event.time_us < Number(last)) return;
  console.log(JSON.stringify({ ...seen, cursor: event.time_us }));
  process.exit(0);
};
jetstream.onCreate("app.bsky.feed.post", () => { seen.posts += 1; });
jetstream.onDelete("app.bsky.feed.post", () => { seen.deleted += 1; });
jetstream.on("error", () => { seen.errors += 1; });
jetstream.on("identity", (event) => { seen.identities += 1; stop(event); });
jetstream.on("account", (event) => { seen.accounts += 1; stop(event); });
jetstream.on("commit", (event) => setImmediate(stop, event));
jetstream.start();
