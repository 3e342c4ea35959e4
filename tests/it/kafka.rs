//! Kafka as an origin, and as an output. The broker is the client library's own stand-in, which can be told to fail; see
//! docs/kafka.md for what else was tried.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::{Command, Stdio};

use krafka::error::ErrorCode;
use krafka::testing::{ApiKey, Control, FakeBroker};
use krafka::{Kafka, Record};
use serde_json::{Value, json};
use standpipe_lab::servers::{command_for_life, spawn_for_life};
use standpipe_lab::simulate::NetworkOptions;

use crate::amqp::messages;
use crate::subscribe::{essence, expected};
use crate::support::chain::{Chain, Program, RUN, SOON, STREAM, Variables, network, purged, redis_command};
use crate::support::house::{House, at_once, is_ready};
use crate::support::{
    Postgres, Redis, Signal, Standpipe, connect, free_port, model, traffic, wait_for, wait_until,
};

const TOPIC: &str = "events";

fn is_long() -> bool {
    std::env::var_os("STANDPIPE_LONG").is_some()
}

/// A deployment without a relay: Redis, a database, and a topic with three partitions.
struct Deployment {
    broker: FakeBroker,
    redis: Redis,
    database: String,
}

impl Deployment {
    async fn start() -> Self {
        let broker = FakeBroker::start().await.unwrap();
        broker.create_topic(TOPIC, 3);
        let redis = Redis::start().await;
        Self { broker, redis, database: Postgres::shared().await.fresh_database().await }
    }

    fn variables(&self) -> Variables {
        Variables::new()
            .with("REDIS_URL", self.redis.url())
            .with("DATABASE_URL", &self.database)
            .with("STREAM_KEEP", "1h")
            .with(
                "KAFKA_ORIGIN_URL",
                format!("kafka://{}/{TOPIC}?group=watched", self.broker.bootstrap_servers()),
            )
    }

    /// Produces messages: commits under their accounts, and all others under one key. Who has a handle depends on the order in which
    /// different accounts claim it.
    async fn produce(&self, messages: &[String]) {
        let kafka = Kafka::builder(self.broker.bootstrap_servers()).connect().await.unwrap();
        let producer = kafka.producer().build().await.unwrap();
        let mut sent = Vec::new();
        for message in messages {
            let parsed: Value = serde_json::from_str(message).unwrap_or_default();
            let key = parsed["data"]["repo"].as_str().unwrap_or("others");
            let record = Record::new(TOPIC, message.clone()).key(key.to_owned());
            sent.push(producer.enqueue(record).await.unwrap());
        }
        for delivery in sent {
            let _ = delivery.await.unwrap();
        }
        producer.close().await.unwrap();
    }

    /// The sum of the offsets in Redis.
    async fn taken(&self) -> u64 {
        let places: BTreeMap<String, String> =
            redis_command(&self.redis, &["HGETALL", &format!("{STREAM}:kafka:{TOPIC}")]).await;
        places
            .iter()
            .filter(|(name, _)| *name != "source")
            .map(|(_, place)| place.parse::<u64>().unwrap())
            .sum()
    }

    async fn all_taken(&self, count: usize) {
        wait_for("the records to be taken", RUN, async || {
            let taken = self.taken().await;
            if taken == count as u64 { Ok(()) } else { Err(format!("{taken} of {count}")) }
        })
        .await;
    }

    async fn appended(&self) -> usize {
        redis_command(&self.redis, &["XLEN", STREAM]).await
    }
}

async fn end(program: &mut Program) {
    program.signal(Signal::Term);
    assert_eq!(program.wait_exit(SOON).await, 0);
}

/// Kills the program repeatedly, at points set by the progress.
#[tokio::test(flavor = "multi_thread")]
async fn every_record_is_appended_exactly_once_through_crashes() {
    let (events, kills) = if is_long() { (6_000, 20) } else { (1_500, 5) };
    let options = NetworkOptions { accounts: 150, events, deletions: true, ..network(41) };
    let messages = messages(&options).await;
    let deployment = Deployment::start().await;
    deployment.produce(&messages).await;
    let variables = deployment.variables();
    let mut program = Program::start("worker", &variables).await;
    for kill in 1..=kills {
        let goal = messages.len() as u64 * kill / (kills + 1);
        wait_until("some records to be taken", RUN, async || deployment.taken().await >= goal).await;
        program.signal(Signal::Kill);
        assert_eq!(program.wait_exit(SOON).await, 128 + 9);
        program = Program::start("worker", &variables).await;
    }
    deployment.all_taken(messages.len()).await;
    assert_eq!(deployment.appended().await, messages.len(), "appended");
    let wanted = model::expected(&traffic::events(&options)).without_versions();
    wait_for("the tables to be those of the model", RUN, async || {
        purged(&deployment.database).await;
        let found = model::read(&connect(&deployment.database).await).await.without_versions();
        let differences = model::differences(&wanted, &found);
        if differences.is_empty() { Ok(()) } else { Err(model::summary(&differences)) }
    })
    .await;
    // Those who watch the group see no lag.
    wait_until("the group's offsets to be set", RUN, async || {
        (0..3).all(|partition| {
            deployment.broker.committed_offset("watched", TOPIC, partition)
                == deployment.broker.next_offset(TOPIC, partition)
        })
    })
    .await;
    let check = Standpipe::run(&["check"], &variables, RUN).await;
    assert!(check.stdout.contains("events exists, with 3 partitions"), "{}", check.stdout);
    let elsewhere = format!("kafka://{}/nowhere", deployment.broker.bootstrap_servers());
    let check = Standpipe::run(&["check"], &variables.clone().with("KAFKA_ORIGIN_URL", elsewhere), RUN).await;
    assert!(check.stdout.contains("create it, or correct KAFKA_ORIGIN_URL"), "{}", check.stdout);
    // The last kill may have come after the last record, and then the lease is still that of the process that died.
    let here = variables.clone().with("HTTP_ADDR", program.http.to_string());
    wait_for("the topic to be ours again", RUN, async || {
        let status = Standpipe::run(&["status"], &here, RUN).await.stdout;
        if status.contains("running, topic events at") { Ok(()) } else { Err(status) }
    })
    .await;
}

/// The leader moves, a broker crashes, records are deleted, the topic is created anew.
#[tokio::test(flavor = "multi_thread")]
async fn what_happens_in_the_cluster_is_followed_and_reported() {
    let deployment = Deployment::start().await;
    let variables = deployment.variables();
    let line = |number: u64| {
        let did = format!("did:plc:{number:0>24}").replace(['0', '1', '8', '9'], "a");
        json!({"type": "identity", "data": {"did": did, "handle": format!("h{number}.example")}}).to_string()
    };
    let mut program = Program::start("worker", &variables).await;
    deployment.produce(&(0..30).map(line).collect::<Vec<_>>()).await;
    deployment.all_taken(30).await;
    for partition in 0..3 {
        deployment.broker.bump_leader_epoch(TOPIC, partition);
    }
    deployment.produce(&(30..60).map(line).collect::<Vec<_>>()).await;
    deployment.all_taken(60).await;
    assert_eq!(deployment.appended().await, 60);

    // Records are deleted while nobody takes them.
    end(&mut program).await;
    deployment.produce(&(60..90).map(line).collect::<Vec<_>>()).await;
    let ends: Vec<i64> =
        (0..3).map(|partition| deployment.broker.next_offset(TOPIC, partition).unwrap()).collect();
    deployment.broker.with_state(|state| {
        for partition in 0..3 {
            let log = state.partition_mut(TOPIC, partition).unwrap();
            log.log_start_offset = ends[partition as usize];
        }
    });
    // The stand-in serves deleted records, and has to be told not to.
    deployment.broker.on_once(ApiKey::Fetch, |_| Control::Error(ErrorCode::OffsetOutOfRange));
    let mut program = Program::start("worker", &variables).await;
    deployment.all_taken(90).await;
    assert_eq!(deployment.appended().await, 60);
    program.metric_rises("standpipe_origin_gaps_total", 0.0).await;
    let missing = program.status().await["missing"].clone();
    assert!(missing["gaps"].as_u64().unwrap() > 0, "{missing}");
    assert!(missing["last_gap"]["reason"].as_str().unwrap().contains("were deleted before"), "{missing}");

    // A partition loses all of its records: a leader that was not in sync.
    end(&mut program).await;
    deployment.broker.with_state(|state| {
        let log = state.partition_mut(TOPIC, 0).unwrap();
        (log.log, log.log_start_offset, log.next_offset) = (Vec::new(), 0, 0);
    });
    let mut program = Program::start("worker", &variables).await;
    deployment.all_taken(90 - usize::try_from(ends[0]).unwrap()).await;
    let missing = program.status().await["missing"].clone();
    assert!(missing["last_gap"]["reason"].as_str().unwrap().contains("it ends at 0"), "{missing}");

    // The same name, another topic.
    end(&mut program).await;
    deployment.broker.delete_topic(TOPIC);
    deployment.broker.create_topic(TOPIC, 3);
    deployment.produce(&(90..100).map(line).collect::<Vec<_>>()).await;
    let program = Program::start("worker", &variables).await;
    deployment.all_taken(10).await;
    assert_eq!(deployment.appended().await, 70);
    let missing = program.status().await["missing"].clone();
    assert!(missing["last_gap"]["reason"].as_str().unwrap().contains("created again"), "{missing}");
}

/// A record that cannot be used, and one that is none.
#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_cannot_be_used_becomes_a_dead_letter() {
    let deployment = Deployment::start().await;
    let variables = deployment.variables();
    let program = Program::start("worker", &variables).await;
    deployment.produce(&["not JSON".to_owned(), r#"{"type":"unheard","data":1}"#.to_owned()]).await;
    deployment.all_taken(2).await;
    program
        .metric_with_is("standpipe_origin_messages_total", r#"origin="kafka",result="unusable""#, 2.0)
        .await;
    wait_for("the dead letters", RUN, async || {
        let listed = Standpipe::run(&["dead-letters", "list", "--json"], &variables, RUN).await;
        if listed.stdout.contains("Kafka topic events: line 1: this is not JSON") {
            Ok(())
        } else {
            Err(listed.stdout)
        }
    })
    .await;
}

/// Everything that is applied is published, in the order of each account, while the program is killed.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_applied_is_published_in_order() {
    let (events, kills) = if is_long() { (20_000, 10) } else { (3_000, 3) };
    let options = NetworkOptions { accounts: 100, events, deletions: true, ..network(42) };
    let chain = Chain::start(&options, None).await;
    let broker = FakeBroker::start().await.unwrap();
    broker.create_topic("applied", 4);
    let variables =
        chain.variables().with("KAFKA_OUTPUT_URL", format!("kafka://{}/applied", broker.bootstrap_servers()));
    let wanted = expected(&traffic::events(&options));
    let mut program = Program::start("run", &variables).await;
    for kill in 1..=kills {
        let goal = wanted.len() as u64 * kill / (kills + 1);
        wait_until("some records to be published", RUN, async || {
            (0..4).filter_map(|partition| broker.next_offset("applied", partition)).sum::<i64>() as u64
                >= goal
        })
        .await;
        program.signal(Signal::Kill);
        assert_eq!(program.wait_exit(SOON).await, 128 + 9);
        program = Program::start("run", &variables).await;
    }
    chain.finished().await;
    wait_until("everything to be published", RUN, async || {
        let groups: Vec<BTreeMap<String, redis::Value>> =
            redis_command(&chain.redis, &["XINFO", "GROUPS", STREAM]).await;
        let at = |name: &str| {
            let group = groups.iter().find(|group| group["name"] == redis::Value::BulkString(name.into()))?;
            Some(group["last-delivered-id"].clone())
        };
        at("out:kafka").is_some() && at("out:kafka") == at("firehose-processors")
    })
    .await;
    let (mut found, mut seen) = (BTreeSet::new(), BTreeSet::new());
    let mut last: BTreeMap<String, (i32, u64)> = BTreeMap::new();
    let mut repeated = 0;
    for record in broker.all_records("applied").unwrap() {
        let id = record.headers.iter().find(|(name, _)| *name == "id").unwrap().1.clone().unwrap();
        if !seen.insert(id) {
            repeated += 1;
            continue;
        }
        let message: Value = serde_json::from_slice(record.value.as_ref().unwrap()).unwrap();
        let did = message["did"].as_str().unwrap().to_owned();
        assert_eq!(record.key_str(), Some(did.as_str()));
        let time = message["time_us"].as_u64().unwrap();
        let before = last.insert(did.clone(), (record.partition, time));
        if let Some((partition, before)) = before {
            assert_eq!(partition, record.partition, "{did} is in two partitions");
            assert!(before <= time, "{did} is out of order");
        }
        found.insert(essence(&message));
    }
    println!("{} records, {repeated} of them repetitions", seen.len());
    assert_eq!(found, wanted.into_iter().collect::<BTreeSet<_>>());
    drop(program);
}

/// A message that Kafka never takes is left out, counted, and holds up no other.
#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_is_too_large_for_the_topic_is_left_out() {
    let house = House::start(at_once()).await;
    let broker = FakeBroker::start().await.unwrap();
    broker.create_topic("applied", 1);
    let url = format!("kafka://{}/applied", broker.bootstrap_servers());
    let program = Program::start("worker", &house.variables().with("KAFKA_OUTPUT_URL", url)).await;
    is_ready(&program).await;
    let line = |name: &str| {
        json!({"type": "identity", "data": {"did": "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa", "handle": format!("{name}.example")}}).to_string()
    };
    broker.on(ApiKey::Produce, |_| Control::Error(ErrorCode::MessageTooLarge));
    assert_eq!(house.post("/events?wait=applied", None, &line("large")).await.unwrap().0, 202);
    program.metric_is("standpipe_output_skipped_entries_total", 1.0).await;
    broker.clear_hooks();
    assert_eq!(house.post("/events?wait=applied", None, &line("small")).await.unwrap().0, 202);
    wait_until("the other one to be published", RUN, async || broker.next_offset("applied", 0) == Some(1))
        .await;
    let record = broker.all_records("applied").unwrap().remove(0);
    assert!(record.value_str().unwrap().contains("small.example"));
}

/// Kafka goes away without closing its connections.
#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_does_not_answer_is_reported() {
    let deployment = Deployment::start().await;
    let program = Program::start("worker", &deployment.variables()).await;
    let line =
        r#"{"type":"identity","data":{"did":"did:plc:aaaaaaaaaaaaaaaaaaaaaaaa","handle":"a.example"}}"#;
    deployment.produce(&[line.to_owned()]).await;
    deployment.all_taken(1).await;
    for (api, control) in [(ApiKey::Fetch, Control::Silence), (ApiKey::Metadata, Control::Silence)] {
        deployment.broker.on(api, move |_| control.clone());
    }
    wait_until("the outage to be noticed", RUN, async || {
        program.metric_with("standpipe_origin_disconnected", "kafka").await > 0.5
    })
    .await;
    deployment.broker.clear_hooks();
    deployment.broker.crash(0);
    wait_for("the process not to be ready", RUN, async || {
        let (code, text) = program.readiness().await;
        if code == 503 && text.contains("cannot take records from Kafka") { Ok(()) } else { Err(text) }
    })
    .await;
    deployment.broker.restart(0);
    deployment.produce(&[line.replace("a.example", "b.example")]).await;
    deployment.all_taken(2).await;
    wait_until("the process to be ready again", RUN, async || program.readiness().await.0 == 200).await;
}

/// From one deployment through a topic of Tansu to another one.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Tansu: make test-kafka"]
async fn events_pass_through_a_topic_of_another_broker() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (program, port) = (root.join("target/tools/tansu"), free_port().unwrap());
    let url = format!("tcp://127.0.0.1:{port}");
    let mut command = command_for_life(&program).unwrap();
    command.args(["broker", "--listener-url", &url, "--advertised-listener-url", &url]);
    command.args(["--storage-engine", "memory://tansu/"]).stdout(Stdio::null()).stderr(Stdio::null());
    let mut broker = spawn_for_life(command).unwrap();
    wait_until("the topic to be created", RUN, async || {
        let mut create = Command::new(&program);
        create.args(["topic", "create", "--broker", &url, "--partitions", "3", "applied"]);
        create.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap().success()
    })
    .await;

    let options = NetworkOptions { accounts: 100, events: 3_000, deletions: true, ..network(43) };
    let chain = Chain::start(&options, None).await;
    let topic = format!("kafka://127.0.0.1:{port}/applied");
    let _first = Program::start("run", &chain.variables().with("KAFKA_OUTPUT_URL", &topic)).await;
    let redis = Redis::start().await;
    let database = Postgres::shared().await.fresh_database().await;
    let variables = Variables::new()
        .with("REDIS_URL", redis.url())
        .with("DATABASE_URL", &database)
        .with("KAFKA_ORIGIN_URL", &topic);
    let _second = Program::start("worker", &variables).await;
    chain.finished().await;
    let wanted = model::expected(&traffic::events(&options)).without_versions();
    wait_for("the tables to be those of the model", RUN, async || {
        purged(&database).await;
        let found = model::read(&connect(&database).await).await.without_versions();
        let differences = model::differences(&wanted, &found);
        if differences.is_empty() { Ok(()) } else { Err(model::summary(&differences)) }
    })
    .await;
    let check = Standpipe::run(&["check"], &variables, RUN).await;
    assert!(check.stdout.contains("applied exists, with 3 partitions"), "{}", check.stdout);
    broker.kill().unwrap();
    broker.wait().unwrap();
}
