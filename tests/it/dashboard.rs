//! The dashboard and control over HTTP: who gets which answer, and that every request takes effect.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::support::chain::{Chain, Program, RUN, SOON, STREAM, Variables, network, redis_command};
use crate::support::{Postgres, Redis, Standpipe, execute, query_value, wait_for, wait_until};
use serde_json::{Value, json};
use standpipe::http::MAX_CONNECTIONS;
use standpipe::http::live::MAX_WATCHERS;
use standpipe_lab::servers::PostgresOptions;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

const TOKEN: &str = "the-admin-token-of-this-test";

/// An HTTP response.
struct Answer {
    code: u16,
    /// In lower case.
    head: String,
    body: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }

    fn error(&self) -> String {
        self.json()["error"].as_str().unwrap().to_owned()
    }
}

/// Sends a request with these headers, each terminated by a line break.
async fn ask(address: SocketAddr, method: &str, path: &str, headers: &str, body: &str) -> Answer {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Length: {}\r\n{headers}\r\n{body}",
        body.len()
    );
    // A server that has already refused the request stops reading.
    let _ = stream.write_all(request.as_bytes()).await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    let answer = String::from_utf8(answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{path}: {answer:?}"));
    let code = head.split(' ').nth(1).unwrap().parse().unwrap();
    Answer { code, head: head.to_lowercase(), body: body.to_owned() }
}

fn bearer(token: &str) -> String {
    format!("Authorization: Bearer {token}\r\n")
}

async fn control(address: SocketAddr, path: &str) -> Answer {
    ask(address, "POST", path, &bearer(TOKEN), "").await
}

/// A client of the event stream.
struct Watcher {
    stream: TcpStream,
    buffer: String,
}

impl Watcher {
    /// `None` if there is no place left.
    async fn start(address: SocketAddr) -> Option<Self> {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("GET /events HTTP/1.1\r\nHost: {address}\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut watcher = Self { stream, buffer: String::new() };
        while !watcher.buffer.contains("\r\n\r\n") {
            watcher.read().await;
        }
        let (head, rest) = watcher.buffer.split_once("\r\n\r\n").unwrap();
        if head.contains(" 503 ") {
            return None;
        }
        assert!(head.to_lowercase().contains("content-type: text/event-stream"), "{head}");
        let rest = rest.to_owned();
        watcher.buffer = rest;
        Some(watcher)
    }

    async fn read(&mut self) {
        let mut bytes = vec![0; 16 * 1024];
        let count = tokio::time::timeout(SOON, self.stream.read(&mut bytes)).await.unwrap().unwrap();
        assert!(count > 0, "the connection ended: {}", self.buffer);
        self.buffer.push_str(std::str::from_utf8(&bytes[..count]).unwrap());
    }

    /// The next event's name and data.
    async fn next(&mut self) -> (String, Value) {
        loop {
            // Each chunk is one event, preceded by its length on a line of its own.
            if let Some((event, rest)) = self.buffer.split_once("\n\n") {
                let line = |start: &str| event.lines().find_map(|line| line.strip_prefix(start));
                let name = line("event: ").unwrap_or_default().to_owned();
                let data = serde_json::from_str(line("data: ").unwrap_or("null")).unwrap();
                let rest = rest.to_owned();
                self.buffer = rest;
                return (name, data);
            }
            self.read().await;
        }
    }

    /// The next snapshot.
    async fn snapshot(&mut self) -> Value {
        loop {
            let (name, data) = self.next().await;
            if name == "snapshot" {
                return data;
            }
        }
    }

    /// The first snapshot that meets the condition.
    async fn until(&mut self, what: &str, is: impl Fn(&Value) -> bool) -> Value {
        let began = Instant::now();
        loop {
            let snapshot = self.snapshot().await;
            if is(&snapshot) {
                return snapshot;
            }
            assert!(began.elapsed() < RUN, "waited in vain for {what}: {snapshot:#}");
        }
    }
}

async fn start(chain: &Chain) -> Program {
    Program::start("run", &chain.variables().with("ADMIN_TOKEN", TOKEN)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_is_self_contained_and_may_load_nothing_else() {
    let redis = Redis::start().await;
    let variables = Variables::new().with("REDIS_URL", redis.url()).with("RELAY_URL", "ws://127.0.0.1:1");
    let program = Program::start("reader", &variables).await;
    let page = ask(program.http, "GET", "/", "", "").await;
    assert_eq!(page.code, 200);
    let policy = page.head.lines().find_map(|line| line.strip_prefix("content-security-policy: ")).unwrap();
    assert!(policy.contains("default-src 'none'") && policy.contains("frame-ancestors 'none'"), "{policy}");
    assert!(!policy.contains("unsafe"), "{policy}");
    let nonce = policy.split("'nonce-").nth(1).unwrap().split('\'').next().unwrap();
    assert_eq!(page.body.matches(&format!("nonce=\"{nonce}\"")).count(), 2, "one style and one script");
    assert!(!page.body.contains("NONCE"));
    // Nothing else is inline, and nothing is loaded from elsewhere.
    for forbidden in ["https://", "src=\"http", "@import", " style=\"", " onclick=\"", "innerHTML"] {
        assert!(!page.body.contains(forbidden), "the page has {forbidden}");
    }
    for header in ["x-content-type-options: nosniff", "x-frame-options: deny", "referrer-policy: no-referrer"]
    {
        assert!(page.head.contains(header), "{}", page.head);
    }
    assert!(!page.head.contains("access-control-"), "{}", page.head);
    let other = ask(program.http, "GET", "/", "", "").await;
    assert!(!other.head.contains(nonce), "every answer has a nonce of its own");
    assert_eq!(ask(program.http, "GET", "/nothing", "", "").await.code, 404);
    assert_eq!(ask(program.http, "POST", "/", "", "").await.code, 405);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_event_stream_contains_everything_the_page_shows() {
    let chain = Chain::start(&network(20_000), Some(2_000)).await;
    let program = start(&chain).await;
    program.finishes_more(1_000.0).await;
    let mut watcher = Watcher::start(program.http).await.unwrap();
    let (name, history) = watcher.next().await;
    assert_eq!(name, "history");
    assert_eq!(history["columns"].as_array().unwrap().len(), history["points"][0].as_array().unwrap().len());
    // The day has the same columns and one point per minute, including the current minute so far.
    let day = ask(program.http, "GET", "/history", "", "").await.json();
    assert_eq!((&day["columns"], &day["step_seconds"]), (&history["columns"], &json!(60)));
    let minutes = day["points"].as_array().unwrap();
    assert!((1..=10).contains(&minutes.len()), "{day}");
    assert!(minutes.last().unwrap()[0].as_f64() >= history["points"][0][0].as_f64(), "{day}");
    let snapshot = watcher
        .until("a rate and percentiles", |snapshot| {
            snapshot["events"]["per_second"].as_f64() > Some(0.0)
                && snapshot["events"]["p99_ms"].is_number()
                // Redis does not always know.
                && snapshot["stream"]["waiting"].is_number()
        })
        .await;
    for path in [
        "/version",
        "/repository",
        "/time_ms",
        "/process/memory_bytes",
        "/process/uptime_seconds",
        "/process/cpu_percent",
        "/health/level",
        "/health/sentence",
        "/control/enabled",
        "/events/finished",
        "/events/p50_ms",
        "/stream/length",
        "/stream/waiting",
        "/stream/pending",
        "/pipelines/0/consumer",
        "/pipelines/0/state",
        "/pipelines/0/words",
        "/pipelines/0/since_ms",
        "/pipelines/0/events_per_second",
        "/pipelines/0/in_flight",
        "/pipelines/0/dead_letters",
        "/reader/connected",
        "/reader/cursor",
        "/reader/frames_per_second",
        "/reader/frame_age_seconds",
        "/reader/backpressure_seconds",
        "/pool/in_use",
        "/pool/max",
        "/kinds/0/kind",
        "/kinds/0/per_second",
        "/retries/reconnect",
        "/dead_letters/count",
        "/dead_letters/by_reason/missing_field",
        "/totals/claimed",
        "/point/0",
    ] {
        assert!(snapshot.pointer(path).is_some_and(|value| !value.is_null()), "{path} in {snapshot:#}");
    }
    let (p50, p99) = (&snapshot["events"]["p50_ms"], &snapshot["events"]["p99_ms"]);
    assert!(p50.as_f64() <= p99.as_f64(), "{p50} {p99}");
    // One snapshot a second, and the time advances.
    let began = Instant::now();
    let first = watcher.snapshot().await;
    let second = watcher.snapshot().await;
    assert!(second["time_ms"].as_u64() > first["time_ms"].as_u64());
    assert!(began.elapsed() > Duration::from_millis(500), "{:?}", began.elapsed());
    // The page shows the same figures that the alerts are based on.
    let snapshot = watcher.snapshot().await;
    assert!(program.entries().await >= snapshot["events"]["finished"].as_f64().unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn control_requires_the_admin_token_and_rejects_other_sites() {
    let redis = Redis::start().await;
    let variables = Variables::new().with("REDIS_URL", redis.url()).with("RELAY_URL", "ws://127.0.0.1:1");
    let with = variables.clone().with("ADMIN_TOKEN", TOKEN).with("LOG_LEVEL", "DEBUG");
    let program = Program::start("reader", &with).await;
    let paths = [
        "/control/pause",
        "/control/resume",
        "/control/log-level?level=DEBUG",
        "/control/drain",
        "/dead-letters/retry",
        "/dead-letters/purge",
    ];
    for path in paths {
        for (headers, code, why) in [
            (String::new(), 401, "needs the admin token"),
            (bearer("the-admin-token-of-this-tesT"), 401, "not the admin token"),
            (bearer(&TOKEN[..TOKEN.len() - 1]), 401, "not the admin token"),
            (bearer(&format!("{TOKEN}x")), 401, "not the admin token"),
            (format!("Authorization: Basic {TOKEN}\r\n"), 401, "not the admin token"),
            (bearer(TOKEN) + "Origin: https://elsewhere.example\r\n", 403, "other sites"),
            (bearer(TOKEN) + "Origin: null\r\n", 403, "other sites"),
            (bearer(TOKEN) + "Sec-Fetch-Site: cross-site\r\n", 403, "other sites"),
        ] {
            let answer = ask(program.http, "POST", path, &headers, "").await;
            assert_eq!(answer.code, code, "{path} {headers}");
            assert!(answer.error().contains(why), "{path} {headers}: {}", answer.body);
            assert!(!answer.head.contains("access-control-"), "{}", answer.head);
        }
        assert_eq!(ask(program.http, "GET", path, &bearer(TOKEN), "").await.code, 405, "{path}");
        let preflight = ask(program.http, "OPTIONS", path, "Origin: https://elsewhere.example\r\n", "").await;
        assert!(preflight.code >= 400 && !preflight.head.contains("access-control-"), "{}", preflight.head);
    }
    // Our own page is not another site.
    let own = bearer(TOKEN) + &format!("Origin: http://{}\r\nSec-Fetch-Site: same-origin\r\n", program.http);
    assert_eq!(ask(program.http, "POST", "/control/resume", &own, "").await.code, 200);
    let wrong = control(program.http, "/control/pause?part=everything").await;
    assert_eq!(wrong.code, 400);
    assert_eq!(control(program.http, "/control/pause?part=pipelines").await.code, 409, "there are none here");
    // Bodies are bounded, and without the token they are refused before they are read.
    let large = format!("{{\"ids\": [\"{}\"]}}", "1".repeat(100_000));
    let headers = bearer(TOKEN) + "Content-Type: application/json\r\n";
    assert_eq!(ask(program.http, "POST", "/dead-letters/purge", &headers, &large).await.code, 413);
    assert_eq!(
        ask(program.http, "POST", "/dead-letters/purge", &headers, "{}").await.code,
        400,
        "which ones?"
    );
    assert!(!program.output().contains(TOKEN), "the token is in the log");
    assert!(program.output().contains("ADMIN_TOKEN=***"), "{}", program.output());
    for path in ["/", "/status", "/metrics", "/readyz"] {
        assert!(!program.get(path).await.1.contains(TOKEN), "{path}");
    }

    // Without a token in the environment nobody has control.
    let program = Program::start("reader", &variables.with("CONSUMER_ID", "other")).await;
    let answer = ask(program.http, "POST", "/control/pause", &bearer(TOKEN), "").await;
    assert_eq!(answer.code, 403);
    assert!(answer.error().contains("set ADMIN_TOKEN"), "{}", answer.body);
}

#[tokio::test(flavor = "multi_thread")]
async fn paused_parts_hold_nothing_and_resume_where_they_stopped() {
    let chain = Chain::start(&network(20_000), Some(1_500)).await;
    let program = start(&chain).await;
    program.finishes_more(500.0).await;

    // Pause the pipelines: nothing stays pending, and the stream grows.
    let answer = control(program.http, "/control/pause?part=pipelines").await;
    assert_eq!(answer.code, 200, "{}", answer.body);
    wait_until("the pipelines to rest", SOON, async || {
        program.status().await["process"]["pipelines"]
            .as_array()
            .unwrap()
            .iter()
            .all(|pipeline| pipeline["state"] == "paused")
    })
    .await;
    let (rested, length) = (program.entries().await, chain.look().await.length);
    assert_eq!(chain.look().await.pending, 0, "entries in hand are acknowledged");
    wait_until("the stream to grow", SOON, async || chain.look().await.length > length + 500).await;
    assert_eq!(program.entries().await, rested, "nothing was read meanwhile");
    assert_eq!(chain.look().await.pending, 0);
    let (code, readiness) = program.readiness().await;
    assert_eq!(code, 503);
    assert!(readiness.contains("paused manually"), "{readiness}");
    assert!(readiness.contains("\"only_paused\":true"), "{readiness}");
    assert_eq!(program.get("/livez").await.0, 200);
    // An orchestrator that restarts unhealthy processes would end the pause.
    let asked = chain.variables().with("HTTP_ADDR", program.http.to_string()).with("ADMIN_TOKEN", TOKEN);
    assert_eq!(Standpipe::run(&["healthcheck"], &asked, SOON).await.code, 0);
    let mut watcher = Watcher::start(program.http).await.unwrap();
    let paused =
        watcher.until("the page to say so", |snapshot| snapshot["health"]["level"] == "paused").await;
    let sentence = paused["health"]["sentence"].as_str().unwrap();
    assert!(sentence.contains("pipelines idle, reader running"), "{sentence}");

    // Pause the reader too: it closes the connection and keeps its lease.
    assert_eq!(control(program.http, "/control/pause?part=reader").await.code, 200);
    wait_until("the reader to rest", SOON, async || {
        let status = program.status().await;
        status["process"]["reader"]["state"] == "paused" && status["process"]["reader"]["connected"] == false
    })
    .await;
    let lease: String = redis_command(&chain.redis, &["GET", "firehose:cursor:lease"]).await;
    let cursor = chain.look().await.cursor;
    // Longer than a lease lasts.
    tokio::time::sleep(Duration::from_secs(12)).await;
    let still: String = redis_command(&chain.redis, &["GET", "firehose:cursor:lease"]).await;
    assert_eq!(lease, still, "the lease is still its own");
    assert_eq!(chain.look().await.cursor, cursor, "nothing came in meanwhile");

    // Everything resumes where it stopped: the result is that of a run that was never paused.
    let resumed = Standpipe::run(&["control", "resume"], &asked, SOON).await;
    assert_eq!((resumed.code, resumed.stdout.as_str()), (0, "everything resumes\n"), "{}", resumed.stderr);
    chain.ends_like_an_undisturbed_run().await;
    assert_eq!(program.readiness().await.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_during_a_database_outage_waits_for_entries_in_hand() {
    let mut postgres = Postgres::start().await;
    let database = postgres.fresh_database().await;
    let chain = Chain::with_database(&network(20_000), Some(1_500), database).await;
    let program = start(&chain).await;
    program.finishes_more(500.0).await;
    postgres.stop_fast().await.unwrap();
    wait_until("entries to be in hand", SOON, async || chain.look().await.pending > 0).await;
    assert_eq!(control(program.http, "/control/pause").await.code, 200);
    let mut watcher = Watcher::start(program.http).await.unwrap();
    // The outage takes precedence: the pause alone would not explain the pending entries.
    watcher.until("the outage to be told", |snapshot| snapshot["health"]["about"] == "postgres").await;
    postgres.start_again().await.unwrap();
    watcher.until("the pause to be told", |snapshot| snapshot["health"]["about"] == "paused").await;
    wait_until("everything in hand to be acknowledged", SOON, async || chain.look().await.pending == 0).await;
    assert_eq!(control(program.http, "/control/resume").await.code, 200);
    chain.ends_like_an_undisturbed_run().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_level_can_be_changed_at_run_time() {
    let redis = Redis::start().await;
    let variables = Variables::new()
        .with("REDIS_URL", redis.url())
        .with("RELAY_URL", "ws://127.0.0.1:1")
        .with("ADMIN_TOKEN", TOKEN);
    let mut program = Program::start("reader", &variables).await;
    let asked = variables.with("HTTP_ADDR", program.http.to_string());
    let set = async |level: &str| Standpipe::run(&["control", "log-level", level], &asked, SOON).await;

    assert_eq!(set("ERROR").await.code, 0);
    // The change itself is logged at the previous level, or not at all.
    let lines = program.lines().len();
    assert_eq!(control(program.http, "/control/pause").await.code, 200);
    assert_eq!(control(program.http, "/control/resume").await.code, 200);
    assert_eq!(program.lines().len(), lines, "{}", program.output());
    assert_eq!(set("debug").await.code, 0);
    program.wait_for_line("the log level was changed manually level=DEBUG", SOON).await;
    assert_eq!(control(program.http, "/control/pause").await.code, 200);
    program.wait_for_line("paused manually part=\"all\"", SOON).await;
    let mut watcher = Watcher::start(program.http).await.unwrap();
    watcher.until("the page to say so", |snapshot| snapshot["control"]["log_level"] == "DEBUG").await;
    assert_eq!(control(program.http, "/control/log-level?level=LOUD").await.code, 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_exits_cleanly_and_leaves_nothing_pending() {
    let chain = Chain::start(&network(20_000), Some(1_500)).await;
    let mut program = start(&chain).await;
    program.finishes_more(500.0).await;
    let asked = chain.variables().with("HTTP_ADDR", program.http.to_string());

    // The command line reports each kind of mistake with its own exit code.
    let missing = Standpipe::run(&["control", "drain"], &asked, SOON).await;
    assert_eq!(missing.code, 64);
    assert!(missing.stderr.contains("ADMIN_TOKEN is not set"), "{}", missing.stderr);
    let wrong = asked.clone().with("ADMIN_TOKEN", "not-the-token-at-all");
    let refused = Standpipe::run(&["control", "drain"], &wrong, SOON).await;
    assert_eq!(refused.code, 1);
    assert!(refused.stderr.contains("not the admin token"), "{}", refused.stderr);
    assert!(!refused.stderr.contains("not-the-token"), "{}", refused.stderr);
    let short =
        Standpipe::run(&["control", "drain"], &asked.clone().with("ADMIN_TOKEN", "short"), SOON).await;
    assert_eq!(short.code, 64);
    assert!(short.stderr.contains("ADMIN_TOKEN: is too short"), "{}", short.stderr);
    let asked = asked.with("ADMIN_TOKEN", TOKEN);
    let nobody = asked.clone().with("HTTP_ADDR", "127.0.0.1:1");
    assert_eq!(Standpipe::run(&["control", "drain"], &nobody, SOON).await.code, 69);
    let off = Standpipe::run(&["control", "drain"], &asked.clone().with("HTTP_ADDR", "off"), SOON).await;
    assert_eq!(off.code, 64);
    assert!(program.is_running());

    let drained = Standpipe::run(&["control", "drain"], &asked, SOON).await;
    assert_eq!(drained.code, 0, "{}", drained.stderr);
    assert_eq!(program.wait_exit(SOON).await, 0);
    assert_eq!(chain.look().await.pending, 0);
    assert!(program.output().contains("drained"), "{}", program.output());
    // And the next start resumes the work.
    let _program = start(&chain).await;
    chain.ends_like_an_undisturbed_run().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_can_be_listed_retried_and_purged() {
    let chain = Chain::start(&network(200), None).await;
    let program = start(&chain).await;
    chain.finished().await;
    for number in 0..60 {
        let op = if number == 0 {
            let profile = json!({"displayName": "x".repeat(300)});
            json!({"action": "create", "path": "app.bsky.actor.profile/self", "cid": "b", "record": profile})
        } else {
            json!({"action": "create", "path": "app.bsky.feed.like/1", "cid": "b", "record": {}})
        };
        let data =
            json!({"repo": format!("did:plc:bad{number}"), "rev": "3n2samfdihk2n", "ops": [op]}).to_string();
        let words = ["XADD", STREAM, "*", "type", "commit", "data", &data, "seq", ""];
        let _: String = redis_command(&chain.redis, &words).await;
    }
    wait_until("the dead letters", SOON, async || chain.look().await.dead_letters == 60).await;

    // From this machine they can be viewed without the token: bounded, newest first, page by page.
    let get = async |path: &str| ask(program.http, "GET", path, "", "").await;
    let first = get("/dead-letters").await;
    assert_eq!(first.code, 200, "{}", first.body);
    let first = first.json();
    assert_eq!(first["letters"].as_array().unwrap().len(), 50);
    let next = first["next"].as_str().unwrap();
    let second = get(&format!("/dead-letters?before={next}")).await.json();
    assert_eq!(second["letters"].as_array().unwrap().len(), 10);
    assert!(second["next"].is_null());
    let ids = |page: &Value| -> Vec<String> {
        page["letters"].as_array().unwrap().iter().map(|l| l["id"].as_str().unwrap().to_owned()).collect()
    };
    let mut all = [ids(&first), ids(&second)].concat();
    all.dedup();
    assert_eq!(all.len(), 60);
    assert!(all.is_sorted_by_key(|id| std::cmp::Reverse(id.parse::<standpipe::event::EntryId>().unwrap())));
    let by_database = get("/dead-letters?reason=database").await.json();
    assert_eq!(by_database["letters"].as_array().unwrap().len(), 1, "{by_database}");
    assert_eq!(by_database["looked_through"], 60);
    // A text is searched for in all of them, in every field and in any case.
    for (query, found) in [
        ("text=PLC:BAD7%22", 1),
        ("text=xxxxxx", 1),
        ("text=xxxxxx&kind=app.bsky.feed.like", 0),
        ("kind=app.bsky.feed.like&limit=10", 10),
        ("text=nowhere", 0),
    ] {
        let page = get(&format!("/dead-letters?{query}")).await.json();
        assert_eq!(page["letters"].as_array().unwrap().len(), found, "{query}: {page}");
    }
    let letter = &by_database["letters"][0];
    assert_eq!(
        (&letter["sqlstate"], &letter["collection"]),
        (&json!("22001"), &json!("app.bsky.actor.profile"))
    );
    assert_eq!(letter["repo"], "did:plc:bad0");
    let id = letter["id"].as_str().unwrap();
    let whole = get(&format!("/dead-letters/{id}")).await.json();
    assert!(whole["op"].as_str().unwrap().contains("xxx"), "{whole}");
    assert_eq!(get("/dead-letters/1-1").await.code, 404);
    assert_eq!(get("/dead-letters/nonsense").await.code, 400);
    assert_eq!(get("/dead-letters?before=nonsense").await.code, 400);
    // A request under a foreign host name that resolves to us comes from someone else's page, or a proxy.
    let mut stream = TcpStream::connect(program.http).await.unwrap();
    let request = "GET /dead-letters HTTP/1.1\r\nHost: rebound.example\r\nConnection: close\r\n\r\n";
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 401"), "{answer}");
    assert!(!answer.contains("did:plc"), "{answer}");

    // Retry: kept while it cannot be applied, removed once it can.
    let headers = bearer(TOKEN) + "Content-Type: application/json\r\n";
    let post = async |path: &str, body: Value| {
        let answer = ask(program.http, "POST", path, &headers, &body.to_string()).await;
        assert_eq!(answer.code, 200, "{}", answer.body);
        answer.json()
    };
    let kept = post("/dead-letters/retry", json!({"ids": [id]})).await;
    assert_eq!((&kept["applied"], &kept["kept"]), (&json!(0), &json!(1)), "{kept}");
    assert!(kept["still_bad"][0]["message"].as_str().unwrap().contains("too long"), "{kept}");
    execute(&chain.database, "ALTER TABLE users ALTER display_name TYPE text").await;
    let applied = post("/dead-letters/retry", json!({"all": true, "reason": "database"})).await;
    assert_eq!((&applied["applied"], &applied["kept"]), (&json!(1), &json!(0)), "{applied}");
    let name = "SELECT length(display_name) FROM users WHERE did = 'did:plc:bad0'";
    assert_eq!(query_value(&chain.database, name).await, "300");
    // Purge: those with a text, then a few by id, then all.
    let removed = post("/dead-letters/purge", json!({"all": true, "text": "did:plc:bad8\""})).await;
    assert_eq!(removed["removed"], 1, "{removed}");
    let some: Vec<&String> = all.iter().filter(|other| *other != id).take(5).collect();
    let some = post("/dead-letters/purge", json!({"ids": some})).await["removed"].as_u64().unwrap();
    // The one with the text may have been among them: their order is that in which the pipelines came to them.
    assert!((4..=5).contains(&some), "{some}");
    let removed = post("/dead-letters/purge", json!({"all": true})).await;
    assert_eq!(removed["removed"].as_u64().unwrap() + some, 58, "{removed}");
    assert_eq!(chain.look().await.dead_letters, 0);
    let unknown = ask(program.http, "POST", "/dead-letters/purge", &headers, "{\"everything\": true}").await;
    assert_eq!(unknown.code, 422, "a mistyped wish is no wish: {}", unknown.body);
}

#[tokio::test(flavor = "multi_thread")]
async fn statement_costs_are_shown_where_pg_stat_statements_is_installed() {
    let library = ("shared_preload_libraries".to_owned(), "pg_stat_statements".to_owned());
    let postgres =
        Postgres::start_with(PostgresOptions { settings: vec![library], ..Postgres::options() }).await;
    let database = postgres.fresh_database().await;
    let chain = Chain::with_database(&network(300), None, database).await;
    let program = start(&chain).await;
    let get = async |headers: &str| ask(program.http, "GET", "/statements", headers, "").await;
    let answer = get("").await.json();
    assert_eq!(answer["counted"], false, "{answer}");
    assert!(answer["why"].as_str().unwrap().contains("CREATE EXTENSION pg_stat_statements"), "{answer}");
    // In whichever schema it was created, and without the text of commands whose constants it keeps.
    execute(&chain.database, "CREATE SCHEMA \"of mine\"").await;
    execute(&chain.database, "CREATE EXTENSION pg_stat_statements SCHEMA \"of mine\"").await;
    execute(&chain.database, "COMMENT ON SCHEMA \"of mine\" IS 'a-secret-of-mine'").await;
    chain.finished().await;
    let answer = get("").await;
    assert!(!answer.body.contains("a-secret-of-mine"), "{}", answer.body);
    let answer = answer.json();
    assert_eq!(answer["counted"], true, "{answer}");
    let statements = answer["statements"].as_array().unwrap();
    assert!((1..=10).contains(&statements.len()), "{answer}");
    let total = |statement: &Value| statement["total_ms"].as_f64().unwrap();
    assert!(statements.is_sorted_by(|a, b| total(a) >= total(b)), "{answer}");
    let shares: f64 = statements.iter().map(|statement| statement["share"].as_f64().unwrap()).sum();
    assert!(shares > 0.0 && shares < 1.001, "{answer}");
    assert!(
        statements.iter().all(|s| s["calls"].as_u64() >= Some(1) && s["mean_ms"].is_number()),
        "{answer}"
    );
    // As with dead letters, other sites and wrong tokens are refused.
    assert_eq!(get("Origin: https://elsewhere.example\r\n").await.code, 401);
    assert_eq!(get(&bearer("not-the-token-at-all")).await.code, 401);

    // A process without pipelines reports that it has none.
    let reader = Program::start("reader", &chain.variables().with("CONSUMER_ID", "reader")).await;
    let answer = ask(reader.http, "GET", "/statements", "", "").await.json();
    assert!(
        answer["counted"] == false && answer["why"].as_str().unwrap().contains("no pipelines"),
        "{answer}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn watchers_and_connections_are_bounded_and_stalled_readers_are_dropped() {
    let redis = Redis::start().await;
    // Many pipelines make large snapshots, so that the buffers in between fill up quickly.
    let variables = Variables::new()
        .with("REDIS_URL", redis.url())
        .with("DATABASE_URL", "postgres://nobody@127.0.0.1:1/nothing")
        .with("PARALLEL_CONSUMERS", "200");
    let program = Program::start("worker", &variables).await;

    // A client that opens the event stream and never reads loses its connection and its place.
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut slow = socket.connect(program.http).await.unwrap();
    slow.write_all(b"GET /events HTTP/1.1\r\nHost: slow\r\n\r\n").await.unwrap();
    let mut watchers = Vec::new();
    while watchers.len() < MAX_WATCHERS - 1 {
        watchers.push(Watcher::start(program.http).await.unwrap());
    }
    assert!(Watcher::start(program.http).await.is_none(), "one more than there is room for");
    let keep_reading = async {
        loop {
            for watcher in &mut watchers {
                watcher.snapshot().await;
            }
        }
    };
    let comes_free = wait_for("the slow one to be dropped", Duration::from_mins(1), async || {
        tokio::time::sleep(Duration::from_millis(500)).await;
        Watcher::start(program.http).await.ok_or("all places are taken")
    });
    tokio::select! {
        _ = comes_free => {}
        () = keep_reading => {}
    }
    let mut rest = Vec::new();
    let read = tokio::time::timeout(SOON, slow.read_to_end(&mut rest)).await;
    assert!(read.is_ok(), "its connection is closed");
    drop(watchers);

    // Idle connections make room for active ones, and so do polite clients that keep theirs open.
    let mut idle = Vec::new();
    for _ in 0..1_000 {
        idle.push(TcpStream::connect(program.http).await.unwrap());
    }
    let mut polite = Vec::new();
    for _ in 0..MAX_CONNECTIONS {
        let mut stream = TcpStream::connect(program.http).await.unwrap();
        stream.write_all(b"GET /livez HTTP/1.1\r\nHost: polite\r\n\r\n").await.unwrap();
        let mut answer = [0; 12];
        stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"HTTP/1.1 200");
        polite.push(stream);
    }
    for path in ["/livez", "/readyz", "/metrics"] {
        let began = Instant::now();
        let (code, _) = program.get(path).await;
        assert!(code == 200 || path == "/readyz", "{path}: {code}");
        assert!(began.elapsed() < Duration::from_secs(3), "{path} took {:?}", began.elapsed());
    }
    // While all connections are busy, health and metrics still have places of their own.
    let mut busy = Vec::new();
    while busy.len() < MAX_CONNECTIONS - MAX_WATCHERS {
        let mut stream = TcpStream::connect(program.http).await.unwrap();
        stream.write_all(b"GET /readyz HTTP/1.1\r\nHost: busy\r\n\r\n").await.unwrap();
        busy.push(stream);
    }
    assert_eq!(program.get("/livez").await.0, 200);
}
