//! RabbitMQ as an origin, and as an output.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use standpipe_lab::servers::{AppendFsync, RedisOptions};
use standpipe_lab::simulate::NetworkOptions;

use crate::subscribe::{essence, expected};
use crate::support::chain::{Chain, Program, RUN, SOON, STREAM, Variables, network, purged, redis_command};
use crate::support::rabbitmq::RabbitMq;
use crate::support::{
    Postgres, Redis, Signal, Standpipe, TcpProxy, connect, model, query_value, traffic, wait_for, wait_until,
};

/// The long version of a test takes minutes; it runs with `make long`.
fn is_long() -> bool {
    std::env::var_os("STANDPIPE_LONG").is_some()
}

/// A name that no other test has.
fn fresh(name: &str) -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!("{name}-{}", NEXT.fetch_add(1, Ordering::SeqCst))
}

/// What a reader appends for this network, an event a line.
pub async fn messages(options: &NetworkOptions) -> Vec<String> {
    let scratch = Chain::start(options, None).await;
    let reader = Program::start("reader", &scratch.variables()).await;
    wait_until("the last frame", RUN, async || scratch.look().await.cursor == Some(scratch.relay.last_seq))
        .await;
    drop(reader);
    let entries: redis::streams::StreamRangeReply =
        redis_command(&scratch.redis, &["XRANGE", STREAM, "-", "+"]).await;
    let line = |entry: &redis::streams::StreamId| {
        let data: Value = serde_json::from_str(&entry.get::<String>("data").unwrap()).unwrap();
        json!({"type": entry.get::<String>("type").unwrap(), "data": data}).to_string()
    };
    entries.ids.iter().filter(|entry| entry.get::<String>("type").unwrap() != "sync").map(line).collect()
}

/// A deployment without a relay: Redis, a database, and a queue.
struct Deployment {
    redis: Redis,
    database: String,
    queue: String,
    url: String,
}

impl Deployment {
    async fn start(rabbit: &RabbitMq) -> Self {
        Self::start_with(rabbit, RedisOptions::default()).await
    }

    async fn start_with(rabbit: &RabbitMq, options: RedisOptions) -> Self {
        let redis = Redis::start_with(options).await;
        let database = Postgres::shared().await.fresh_database().await;
        let queue = fresh("queue");
        rabbit.declare(&queue).await;
        Self { redis, database, url: rabbit.url(&format!("queue={queue}")), queue }
    }

    fn variables(&self, prefetch: u16) -> Variables {
        Variables::new()
            .with("REDIS_URL", self.redis.url())
            .with("DATABASE_URL", &self.database)
            .with("AMQP_ORIGIN_URL", format!("{}&prefetch={prefetch}", self.url))
    }
}

async fn taken(program: &Program) -> f64 {
    program.metric_with("standpipe_origin_messages_total", r#"result="accepted""#).await
}

/// Kills everything repeatedly, at points set by the progress.
#[tokio::test(flavor = "multi_thread")]
async fn every_message_is_applied_through_crashes_of_everything() {
    const PREFETCH: u16 = 100;
    let (events, ours, theirs) = if is_long() { (6_000, 20, 5) } else { (1_500, 4, 1) };
    let options = NetworkOptions { accounts: 150, events, deletions: true, ..network(21) };
    let messages = messages(&options).await;
    let mut rabbit = RabbitMq::start().await;
    let mut deployment = Deployment::start(&rabbit).await;
    rabbit.publisher().await.publish(&deployment.queue, messages.iter().map(String::as_str)).await;
    let variables = deployment.variables(PREFETCH);
    let mut program = Program::start("worker", &variables).await;
    let mut most = 0;
    let kills = ours + 2 * theirs;
    for kill in 1..=kills {
        let goal = messages.len() as u64 * kill / (kills + 1);
        wait_for(&format!("{goal} messages to be taken"), RUN, async || {
            let Some((ready, unacknowledged)) = rabbit.depth(&deployment.queue).await else {
                return Err("no answer".to_owned());
            };
            most = most.max(unacknowledged);
            let done = messages.len() as u64 - (ready + unacknowledged).min(messages.len() as u64);
            if done >= goal { Ok(()) } else { Err(format!("{done}, {unacknowledged} unacknowledged")) }
        })
        .await;
        match kill % (kills / theirs) {
            0 => {
                rabbit.sigkill().await.unwrap();
                rabbit.start_again().await.unwrap();
            }
            1 => {
                deployment.redis.sigkill().await.unwrap();
                deployment.redis.start_again().await.unwrap();
            }
            _ => {
                program.signal(Signal::Kill);
                assert_eq!(program.wait_exit(SOON).await, 128 + 9);
                program = Program::start("worker", &variables).await;
            }
        }
    }
    rabbit.is_empty(&deployment.queue).await;
    assert!(
        most > 0 && most <= u64::from(PREFETCH),
        "{most} messages unacknowledged, with a prefetch of {PREFETCH}"
    );
    let wanted = model::expected(&traffic::events(&options)).without_versions();
    wait_for("the tables to be those of the model", RUN, async || {
        purged(&deployment.database).await;
        let found = model::read(&connect(&deployment.database).await).await.without_versions();
        let differences = model::differences(&wanted, &found);
        if differences.is_empty() { Ok(()) } else { Err(model::summary(&differences)) }
    })
    .await;
    let audit = Standpipe::run(&["audit"], &variables, RUN).await;
    assert_eq!(audit.code, 0, "{}", audit.stdout);
    assert!(program.is_running());
}

fn post(number: usize) -> String {
    let record =
        json!({"$type": "app.bsky.feed.post", "text": "hello", "createdAt": "2026-11-21T04:17:51.287Z"});
    let op = json!({"action": "create", "path": format!("app.bsky.feed.post/p{number}"), "record": record});
    json!({"type": "commit", "data": {"repo": "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa", "ops": [op]}}).to_string()
}

/// Nothing is acknowledged that is not durable.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_acknowledged_while_redis_is_frozen() {
    let rabbit = RabbitMq::shared().await;
    let mut deployment = Deployment::start(rabbit).await;
    let program = Program::start("worker", &deployment.variables(50)).await;
    wait_until("the program to be ready", RUN, async || program.readiness().await.0 == 200).await;
    let mut publisher = rabbit.publisher().await;
    publisher.publish(&deployment.queue, [post(0)]).await;
    wait_for("the first message to be taken", SOON, async || {
        let taken = taken(&program).await;
        if taken == 1.0 { Ok(()) } else { Err(taken) }
    })
    .await;
    deployment.redis.pause().await.unwrap();
    publisher.publish(&deployment.queue, (1..=200).map(post)).await;
    wait_until("50 messages to be unacknowledged", SOON, async || {
        rabbit.depth(&deployment.queue).await == Some((150, 50))
    })
    .await;
    // It notices that Redis does not answer, and gives nothing up.
    wait_until("the program to wait", RUN, async || {
        program.status().await["process"]["origins"][0]["state"] == "waiting_for_redis"
    })
    .await;
    assert_eq!(rabbit.depth(&deployment.queue).await, Some((150, 50)));
    deployment.redis.resume().unwrap();
    rabbit.is_empty(&deployment.queue).await;
    wait_for("all to be applied", RUN, async || {
        let posts = query_value(&deployment.database, "SELECT count(*) FROM posts").await;
        if posts == "201" { Ok(()) } else { Err(posts) }
    })
    .await;
}

/// RabbitMQ gives each process new messages as it acknowledges old ones.
#[tokio::test(flavor = "multi_thread")]
async fn processes_share_a_queue_by_their_speed() {
    // Without the two seconds that an older Redis takes to have something on its disk.
    let at_once = RedisOptions { append_fsync: AppendFsync::Always, ..RedisOptions::default() };
    let rabbit = RabbitMq::shared().await;
    let deployment = Deployment::start_with(rabbit, at_once).await;
    let proxy = TcpProxy::for_url(&deployment.redis.url()).await;
    let variables = |name: &str| deployment.variables(10).with("CONSUMER_ID", name);
    let slow = Program::start(
        "worker",
        &variables("slow").with("REDIS_URL", proxy.url_through(&deployment.redis.url())),
    )
    .await;
    let fast = Program::start("worker", &variables("fast")).await;
    for program in [&slow, &fast] {
        wait_until("a process to take messages", RUN, async || {
            program.status().await["process"]["origins"][0]["state"] == "running"
        })
        .await;
    }
    proxy.delay(Duration::from_millis(500));
    let count = if is_long() { 6_000 } else { 1_500 };
    let mut publisher = rabbit.publisher().await;
    publisher.publish(&deployment.queue, (0..count).map(post)).await;
    let all_taken = async |programs: &[&Program], count: usize| {
        wait_until("all to be taken", RUN, async || {
            let mut sum = 0.0;
            for program in programs {
                sum += taken(program).await;
            }
            sum as usize >= count
        })
        .await;
    };
    all_taken(&[&slow, &fast], count).await;
    let (by_slow, by_fast) = (taken(&slow).await, taken(&fast).await);
    println!("{by_slow} by the slow one, {by_fast} by the fast one");
    assert!(by_slow > 0.0, "the slow one took nothing");
    assert!(by_fast >= 0.8 * f64::from(u32::try_from(count).unwrap()), "the fast one took only {by_fast}");

    let third = Program::start("worker", &variables("third")).await;
    wait_until("the third to take messages", RUN, async || {
        third.status().await["process"]["origins"][0]["state"] == "running"
    })
    .await;
    let mut next = count;
    wait_for("the third to take its share", SOON, async || {
        let before = taken(&third).await;
        publisher.publish(&deployment.queue, (next..next + 300).map(post)).await;
        next += 300;
        all_taken(&[&slow, &fast, &third], next).await;
        let by_third = taken(&third).await - before;
        println!("{by_third} of the next 300 by the third");
        if by_third >= 75.0 { Ok(()) } else { Err(by_third) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_used_becomes_a_dead_letter_and_holds_up_nobody() {
    let rabbit = RabbitMq::shared().await;
    let deployment = Deployment::start(rabbit).await;
    let variables = deployment.variables(500);
    let program = Program::start("worker", &variables).await;
    let mut publisher = rabbit.publisher().await;
    let broken = format!("{}\n{{broken", post(1));
    let huge = vec![b'x'; 9 << 20];
    let bodies: [Vec<u8>; 6] =
        [post(0).into(), b"\xff\xfe".into(), broken.into(), huge, Vec::new(), post(2).into()];
    publisher.publish(&deployment.queue, bodies).await;
    rabbit.is_empty(&deployment.queue).await;
    wait_for("the dead letters", RUN, async || {
        let count: u64 = redis_command(&deployment.redis, &["XLEN", "firehose:events:dead"]).await;
        if count == 4 { Ok(()) } else { Err(count) }
    })
    .await;
    wait_for("the good ones to be applied", SOON, async || {
        let posts = query_value(&deployment.database, "SELECT count(*) FROM posts").await;
        if posts == "2" { Ok(()) } else { Err(posts) }
    })
    .await;
    let list = Standpipe::run(&["dead-letters", "list"], &variables, SOON).await.stdout;
    let second = format!("queue {}: line 2: this is not JSON", deployment.queue);
    for says in [&*second, "larger than 8 MiB", "contains no event", "undecodable"] {
        assert!(list.contains(says), "{says}: {list}");
    }
    // They are counted once they are acknowledged.
    program.metric_with_is("standpipe_origin_messages_total", r#"result="unusable""#, 4.0).await;
    let status =
        Standpipe::run(&["status"], &variables.clone().with("HTTP_ADDR", program.http.to_string()), SOON)
            .await;
    assert!(
        status.stdout.contains(&format!("RabbitMQ      running, queue {} at 127.0.0.1", deployment.queue)),
        "{}",
        status.stdout
    );
    assert!(status.stdout.contains("6 messages taken, 4 of them unusable"), "{}", status.stdout);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_queue_is_created_and_errors_are_reported() {
    let mut rabbit = RabbitMq::start().await;
    let deployment = Deployment::start(&rabbit).await;
    rabbit.delete(&deployment.queue).await;
    let variables = deployment.variables(500);
    let mut program = Program::start("worker", &variables).await;
    let publish = async |rabbit: &RabbitMq, number: usize| {
        wait_until("the queue to be there", RUN, async || rabbit.depth(&deployment.queue).await.is_some())
            .await;
        rabbit.publisher().await.publish(&deployment.queue, [post(number)]).await;
        wait_for("it to be applied", RUN, async || {
            let sql = format!("SELECT count(*) FROM posts WHERE uri LIKE '%/p{number}'");
            let posts = query_value(&deployment.database, &sql).await;
            if posts == "1" { Ok(()) } else { Err(posts) }
        })
        .await;
    };
    publish(&rabbit, 1).await;
    // Deleted under it.
    rabbit.delete(&deployment.queue).await;
    program.wait_for_line("cannot take messages from RabbitMQ", SOON).await;
    publish(&rabbit, 2).await;
    let made = rabbit.api(&format!("/api/queues/%2F/{}", deployment.queue)).await;
    assert_eq!(made["durable"], true, "{made}");

    let check = Standpipe::run(&["check"], &variables, SOON).await;
    assert!(check.stdout.contains(&format!("{} exists", deployment.queue)), "{}", check.stdout);
    let wrong = deployment.url.replace("guest:guest", "guest:secret-word");
    let wrong = variables.clone().with("AMQP_ORIGIN_URL", wrong).with("CONSUMER_ID", "wrong");
    let mut refused = Program::start("worker", &wrong).await;
    let line = refused.wait_for_line("cannot take messages from RabbitMQ", SOON).await;
    assert!(!line.contains("secret-word"), "{line}");
    wait_until("it not to be ready", RUN, async || {
        let (code, text) = refused.readiness().await;
        code == 503 && text.contains("cannot take messages from RabbitMQ for")
    })
    .await;
    let check = Standpipe::run(&["check"], &wrong, SOON).await;
    assert_eq!(check.code, 69, "{}", check.stdout);
    assert!(
        check.stdout.contains("AMQP_ORIGIN_URL") && !check.stdout.contains("secret-word"),
        "{}",
        check.stdout
    );
    assert_eq!(refused.metric("standpipe_origin_disconnected").await, 1.0);
    drop(refused);

    // A frozen server: the only sign is a silent connection.
    rabbit.pause().await.unwrap();
    program.wait_for_line("RabbitMQ has not answered", RUN).await;
    rabbit.resume().unwrap();
    publish(&rabbit, 3).await;
}

/// A chain whose program publishes to this exchange.
fn publishing(chain: &Chain, rabbit: &RabbitMq, parameters: &str) -> Variables {
    chain.variables().with("AMQP_OUTPUT_URL", rabbit.url(parameters))
}

/// The essence of each message in a queue, without repetitions, in order; and how many there were.
async fn drained(rabbit: &RabbitMq, queue: &str) -> (Vec<String>, usize) {
    let bodies = rabbit.drain(queue).await;
    let count = bodies.len();
    let mut seen = BTreeSet::new();
    let mut kept = Vec::new();
    for body in bodies {
        let essence = essence(&serde_json::from_slice(&body).unwrap());
        if seen.insert(essence.clone()) {
            kept.push(essence);
        }
    }
    (kept, count)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_queue_gets_everything_that_is_applied() {
    let (events, kills) = if is_long() { (20_000, 10) } else { (3_000, 3) };
    let options = NetworkOptions { accounts: 100, events, deletions: true, ..network(31) };
    let (mut rabbit, chain) = (RabbitMq::start().await, Chain::start(&options, None).await);
    for queue in ["a", "b", "c"] {
        rabbit.bind("events", "fanout", queue, "").await;
    }
    let variables = publishing(&chain, &rabbit, "exchange=events");
    let mut program = Program::start("run", &variables).await;
    let wanted = expected(&traffic::events(&options));
    for kill in 1..=kills {
        let goal = wanted.len() as u64 * kill / (kills + 1);
        wait_for("some messages to be in the queues", RUN, async || {
            let (ready, _) = rabbit.depth("a").await.ok_or("no answer")?;
            if ready >= goal { Ok(()) } else { Err("not yet") }
        })
        .await;
        if kill == 2 {
            rabbit.sigkill().await.unwrap();
            rabbit.start_again().await.unwrap();
        } else {
            program.signal(Signal::Kill);
            assert_eq!(program.wait_exit(SOON).await, 128 + 9);
            program = Program::start("run", &variables).await;
        }
    }
    chain.finished().await;
    published(&chain.redis).await;
    for queue in ["a", "b", "c"] {
        let (found, count) = drained(&rabbit, queue).await;
        println!("{queue}: {count} messages, {} of them repetitions", count - found.len());
        assert_eq!(found.len(), wanted.iter().collect::<BTreeSet<_>>().len(), "{queue}");
        assert_eq!(found.iter().collect::<BTreeSet<_>>(), wanted.iter().collect::<BTreeSet<_>>(), "{queue}");
    }
}

/// The position of the output's group is that of the apply group.
async fn published(redis: &Redis) {
    wait_until("everything to be published", RUN, async || {
        let groups: Vec<BTreeMap<String, redis::Value>> =
            redis_command(redis, &["XINFO", "GROUPS", STREAM]).await;
        let at = |name: &str| {
            let group = groups.iter().find(|group| group["name"] == redis::Value::BulkString(name.into()))?;
            Some(group["last-delivered-id"].clone())
        };
        at("out:rabbitmq").is_some() && at("out:rabbitmq") == at("firehose-processors")
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_consistent_hash_exchange_sends_an_account_to_one_queue() {
    let options = NetworkOptions { accounts: 100, events: 2_000, ..network(32) };
    let (rabbit, chain) = (RabbitMq::shared().await, Chain::start(&options, None).await);
    let queues = ["a", "b", "c", "d"].map(fresh);
    let exchange = fresh("spread");
    for queue in &queues {
        rabbit.bind(&exchange, "x-consistent-hash", queue, "1").await;
    }
    let variables = publishing(&chain, rabbit, &format!("exchange={exchange}&key=did"));
    let _program = Program::start("run", &variables).await;
    chain.finished().await;
    published(&chain.redis).await;
    let mut owners: BTreeMap<String, BTreeSet<&String>> = BTreeMap::new();
    let mut total = 0;
    for queue in &queues {
        let mut last: BTreeMap<String, u64> = BTreeMap::new();
        for body in rabbit.drain(queue).await {
            let message: Value = serde_json::from_slice(&body).unwrap();
            let did = message["did"].as_str().unwrap().to_owned();
            let time = message["time_us"].as_u64().unwrap();
            let before = last.insert(did.clone(), time).unwrap_or(0);
            assert!(before <= time, "{did} is out of order in {queue}");
            owners.entry(did).or_default().insert(queue);
            total += 1;
        }
    }
    assert_eq!(total, expected(&traffic::events(&options)).len());
    assert!(owners.values().all(|queues| queues.len() == 1), "{owners:?}");
    let used: BTreeSet<_> = owners.values().flatten().collect();
    assert_eq!(used.len(), queues.len(), "{owners:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_queue_nothing_counts_as_published() {
    let options = NetworkOptions { accounts: 20, events: 300, ..network(33) };
    let (rabbit, chain) = (RabbitMq::shared().await, Chain::start(&options, None).await);
    let (exchange, queue) = (fresh("events"), fresh("late"));
    rabbit.exchange(&exchange, "fanout").await;
    let variables = publishing(&chain, rabbit, &format!("exchange={exchange}"));
    let mut program = Program::start("run", &variables).await;
    chain.finished().await;
    let line = program.wait_for_line("cannot publish to RabbitMQ", SOON).await;
    assert!(line.contains("no queue takes messages with the routing key"), "{line}");
    program.metric_is("standpipe_output_disconnected", 1.0).await;
    let groups: Vec<BTreeMap<String, redis::Value>> =
        redis_command(&chain.redis, &["XINFO", "GROUPS", STREAM]).await;
    let group =
        groups.iter().find(|group| group["name"] == redis::Value::BulkString("out:rabbitmq".into())).unwrap();
    assert_eq!(group["last-delivered-id"], redis::Value::BulkString("0-0".into()));
    wait_until("it not to be ready", RUN, async || {
        let (code, text) = program.readiness().await;
        code == 503 && text.contains("no queue takes messages")
    })
    .await;
    rabbit.bind(&exchange, "fanout", &queue, "").await;
    published(&chain.redis).await;
    let (found, _) = drained(rabbit, &queue).await;
    assert_eq!(found.len(), expected(&traffic::events(&options)).len());
    program.metric_is("standpipe_output_disconnected", 0.0).await;
    let check = Standpipe::run(&["check"], &variables, SOON).await;
    assert!(check.stdout.contains(&format!("{exchange} exists")), "{}", check.stdout);
}

/// Nobody publishes any more, and the group is still there.
#[tokio::test(flavor = "multi_thread")]
async fn an_output_that_nobody_reads_skips_entries_and_reports_it() {
    let options = NetworkOptions { accounts: 50, events: 2_000, ..network(34) };
    let chain = Chain::start(&options, None).await;
    let _: String =
        redis_command(&chain.redis, &["XGROUP", "CREATE", STREAM, "out:rabbitmq", "0", "MKSTREAM"]).await;
    let hold = chain.variables().with("REDIS_MAX_STREAM_LEN", "500");
    let mut program = Program::start("run", &hold).await;
    // By default, nothing is lost: the reader waits.
    wait_until("the reader to wait for room", RUN, async || {
        program.status().await["process"]["reader"]["state"] == "waiting_for_room"
    })
    .await;
    wait_until("it to say which group holds the stream", SOON, async || {
        program.status().await["stream"]["trim_held_by"] == "out:rabbitmq"
    })
    .await;
    let check = Standpipe::run(&["check"], &hold, SOON).await;
    assert!(check.stdout.contains("group out:rabbitmq has acknowledged the least"), "{}", check.stdout);
    program.signal(Signal::Term);
    assert_eq!(program.wait_exit(SOON).await, 0);

    let mut program = Program::start("run", &hold.with("OUT_MAX_LAG", "10s")).await;
    program.wait_for_line("an output is too far behind", RUN).await;
    program.metric_rises("standpipe_output_skipped_entries_total", 400.0).await;
    chain.ends_like_an_undisturbed_run().await;
    let groups: Vec<BTreeMap<String, redis::Value>> =
        redis_command(&chain.redis, &["XINFO", "GROUPS", STREAM]).await;
    assert_eq!(groups.len(), 2);
}

/// It waits at the message that no queue takes, and repeats nothing else with it more than once.
#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_no_queue_takes_is_waited_for_alone() {
    let options = NetworkOptions { accounts: 50, events: 1_500, ..network(35) };
    let (rabbit, chain) = (RabbitMq::shared().await, Chain::start(&options, None).await);
    let (exchange, posts, rest) = (fresh("topics"), fresh("posts"), fresh("rest"));
    rabbit.bind(&exchange, "topic", &posts, "app.bsky.feed.post").await;
    let url = rabbit.url(&format!("exchange={exchange}&key=collection"));
    let proxy = TcpProxy::start(format!("127.0.0.1:{}", rabbit.port())).await;
    let url = url.replace(&format!("127.0.0.1:{}", rabbit.port()), &proxy.address().to_string());
    let mut program = Program::start("run", &chain.variables().with("AMQP_OUTPUT_URL", url)).await;
    program.wait_for_line("no queue takes messages with the routing key", RUN).await;
    chain.finished().await;
    // It tries again and again.
    let before = proxy.connections();
    wait_until("six more attempts", RUN, async || proxy.connections() >= before + 6).await;
    rabbit.bind(&exchange, "topic", &rest, "#").await;
    published(&chain.redis).await;
    let (found, _) = drained(rabbit, &rest).await;
    let (found_posts, count) = drained(rabbit, &posts).await;
    let wanted: BTreeSet<String> = expected(&traffic::events(&options)).into_iter().collect();
    let is_post = |message: &&String| message.contains("\"app.bsky.feed.post\"/");
    assert_eq!(found_posts.len(), wanted.iter().filter(is_post).count());
    // The others came before there was a queue for everything: the very first is an identity.
    assert!(found.len() >= wanted.len() - 1, "{} of {}", found.len(), wanted.len());
    println!("{count} messages about posts, {} of them repetitions", count - found_posts.len());
    assert!(count - found_posts.len() <= 200, "{count} for {} posts", found_posts.len());
}
