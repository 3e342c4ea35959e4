//! A fifth of all commits is lost upstream, accounts change their keys, and whatever can be killed is killed while
//! repositories are repaired: at the end the tables are what the accounts have. The same after the lost commits have
//! arrived late.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use shrike::cbor::Value;
use tokio::sync::watch;

use crate::support::chain::{CURSOR, RUN, STREAM, redis_command};
use crate::support::scripted::{Op, ScriptedRelay, create, delete, identity, post, renumbered, rev};
use crate::support::signed::{Plc, Signed};
use crate::support::{Postgres, Redis, Signal, Standpipe, query_rows, query_value, wait_for, wait_until};

const ACCOUNTS: usize = 40;
const COMMITS: usize = 2_000;

/// What a frame tells, and what the account's server has from then on.
struct Sent {
    frame: Vec<u8>,
    did: String,
    repository: Option<Vec<u8>>,
    document: serde_json::Value,
}

/// An account with the records that it has.
struct Member {
    account: Signed,
    live: BTreeMap<String, String>,
    next: u64,
}

impl Member {
    /// Some changes: what a record is about, by its path; `None` for one that goes.
    fn changes(&mut self, rng: &mut fastrand::Rng, dids: &[String]) -> Vec<Op> {
        let mut ops: BTreeMap<String, Op> = BTreeMap::new();
        for _ in 0..rng.usize(1..4) {
            let existing: Vec<String> =
                self.live.keys().filter(|path| !ops.contains_key(*path)).cloned().collect();
            let (path, op) = match rng.u8(0..10) {
                0..3 if !existing.is_empty() => {
                    let path = rng.choice(existing).unwrap();
                    self.live.remove(&path);
                    (path.clone(), delete(&path))
                }
                3 if existing.iter().any(|path| path.starts_with("app.bsky.feed.post")) => {
                    let posts = existing.into_iter().filter(|path| path.starts_with("app.bsky.feed.post"));
                    let path = rng.choice(posts.collect::<Vec<_>>()).unwrap();
                    let text = format!("changed {}", rng.u32(..));
                    self.live.insert(path.clone(), text.clone());
                    let op = create(&path, &post(&text));
                    (path, Op { action: "update", ..op })
                }
                kind => {
                    self.next += 1;
                    let (collection, about) = match kind {
                        0..7 => ("app.bsky.feed.post", format!("text {}", rng.u32(..))),
                        7 | 8 => {
                            let author = rng.choice(dids).unwrap();
                            (
                                "app.bsky.feed.like",
                                format!("at://{author}/app.bsky.feed.post/k{}", rng.u8(1..9)),
                            )
                        }
                        _ => ("app.bsky.graph.follow", rng.choice(dids).unwrap().clone()),
                    };
                    let path = format!("{collection}/k{}", self.next);
                    self.live.insert(path.clone(), about.clone());
                    (path.clone(), record(&path, &about))
                }
            };
            ops.insert(path, op);
        }
        ops.into_values().collect()
    }
}

fn record(path: &str, about: &str) -> Op {
    let subject = match path.split('/').next().unwrap() {
        "app.bsky.feed.post" => return create(path, &post(about)),
        "app.bsky.feed.like" => Value::Map(vec![
            ("cid", Value::Text("bafyreidxkskkoafhrzsxtjwapsmnaqft7ntyoepjexjyw4zivcyej7qo3i")),
            ("uri", Value::Text(about)),
        ]),
        _ => Value::Text(about),
    };
    let kind = path.split('/').next().unwrap();
    create(
        path,
        &Value::Map(vec![
            ("$type", Value::Text(kind)),
            ("subject", subject),
            ("createdAt", Value::Text("2026-11-21T04:17:51.287Z")),
        ]),
    )
}

/// The frames that arrive, in order, those that are lost, and the members at the end.
fn traffic(rng: &mut fastrand::Rng) -> (Vec<Sent>, Vec<Vec<u8>>, Vec<Member>) {
    let mut members: Vec<Member> = (0..ACCOUNTS)
        .map(|n| Member { account: Signed::new(u32::try_from(n).unwrap()), live: BTreeMap::new(), next: 0 })
        .collect();
    let dids: Vec<String> = members.iter().map(|member| member.account.did.clone()).collect();
    let (mut sent, mut lost) = (Vec::new(), Vec::new());
    let mut clock = 0;
    for n in 0..COMMITS + ACCOUNTS {
        let last = n.checked_sub(COMMITS);
        let member = match last {
            Some(index) => &mut members[index],
            None => rng.choice(members.iter_mut()).unwrap(),
        };
        clock += 1;
        let seq = i64::try_from(sent.len()).unwrap() + 1;
        if last.is_none() && rng.u32(0..100) == 0 {
            // A new key, of which the network is told, or not.
            member.account.rotate(rng.u32(1000..1_000_000));
            let told = rng.bool();
            if told {
                sent.push(Sent {
                    frame: identity(seq, &member.account.did, None),
                    did: member.account.did.clone(),
                    repository: None,
                    document: member.account.document("SERVER"),
                });
                continue;
            }
        }
        let ops = member.changes(rng, &dids);
        let frame = member.account.commit(seq, &rev(clock * 1000), &ops);
        if last.is_none() && rng.u32(0..5) == 0 {
            lost.push(frame);
            continue;
        }
        sent.push(Sent {
            frame,
            did: member.account.did.clone(),
            repository: Some(member.account.repository()),
            document: member.account.document("SERVER"),
        });
    }
    (sent, lost, members)
}

/// The lost frames with the numbers after the others.
fn late(lost: &[Vec<u8>], first: usize) -> Vec<Vec<u8>> {
    (first..).zip(lost).map(|(seq, frame)| renumbered(frame, i64::try_from(seq).unwrap())).collect()
}

fn expected(members: &[Member]) -> BTreeSet<(String, String)> {
    let records = members.iter().flat_map(|member| {
        member.live.iter().map(|(path, about)| (format!("at://{}/{path}", member.account.did), about.clone()))
    });
    records.collect()
}

async fn found(database: &str) -> BTreeSet<(String, String)> {
    let sql = "SELECT uri, text FROM posts UNION ALL SELECT uri, post_uri FROM likes
               UNION ALL SELECT uri, following_did FROM follows";
    let rows = query_rows(database, sql).await;
    rows.into_iter().map(|row| (row[0].clone().unwrap(), row[1].clone().unwrap())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_lossy_relay_leaves_out_is_repaired_under_fire() {
    let seed =
        std::env::var("STANDPIPE_SEED").map_or_else(|_| fastrand::u64(..), |seed| seed.parse().unwrap());
    println!("STANDPIPE_SEED={seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    let (sent, lost, members) = traffic(&mut rng);
    assert!(lost.len() > COMMITS / 8, "{} lost", lost.len());
    let count = sent.len();
    let late = late(&lost, count + 1);
    let last = count + late.len();

    let plc = Arc::new(Plc::start().await);
    let (allowed, gate) = watch::channel(0_usize);
    let frames: Arc<Vec<Vec<u8>>> =
        Arc::new(sent.iter().map(|sent| sent.frame.clone()).chain(late).collect());
    let sent = Arc::new(sent);
    let newest = Arc::new(std::sync::Mutex::new(0));
    let relay = {
        let (plc, sent, newest) = (Arc::clone(&plc), Arc::clone(&sent), Arc::clone(&newest));
        ScriptedRelay::start(move |mut connection| {
            let (plc, sent, newest) = (Arc::clone(&plc), Arc::clone(&sent), Arc::clone(&newest));
            let (frames, mut gate) = (Arc::clone(&frames), gate.clone());
            async move {
                let start = connection.cursor.map_or(0, |cursor| usize::try_from(cursor).unwrap());
                for (index, frame) in frames.iter().enumerate().skip(start) {
                    if gate.wait_for(|allowed| *allowed > index).await.is_err() {
                        return;
                    }
                    // What an account has, its server has before the relay tells.
                    if let Some(sent) = sent.get(index) {
                        let mut newest = newest.lock().unwrap();
                        if index >= *newest {
                            *newest = index + 1;
                            let document = sent.document.to_string().replace("SERVER", &plc.url());
                            plc.put(&sent.did, serde_json::from_str(&document).unwrap());
                            if let Some(repository) = &sent.repository {
                                plc.answer(&sent.did, crate::support::signed::Answer::ok(repository.clone()));
                            }
                        }
                    }
                    if !connection.send(frame).await {
                        return;
                    }
                }
                connection.stay().await;
            }
        })
        .await
    };

    let mut redis = Redis::start().await;
    let mut postgres = Postgres::start().await;
    let database = postgres.fresh_database().await;
    let variables: Vec<(String, String)> = [
        ("RELAY_URL", relay.url()),
        ("REDIS_URL", redis.url()),
        ("DATABASE_URL", database.clone()),
        ("PLC_URL", plc.url()),
        ("VERIFY", "on".to_owned()),
        ("NOTIFY_WITHIN", "off".to_owned()),
        ("ALLOW_PRIVATE_ADDRESSES", "yes".to_owned()),
        ("COLLECTIONS", "*".to_owned()),
        ("HTTP_ADDR", "off".to_owned()),
        ("CONSUMER_ID", "healing".to_owned()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .to_vec();
    let mut program = Standpipe::start(&["run"], &variables);

    // Every tenth of the traffic, something dies, while repairs are under way.
    let steps = 10;
    for step in 1..=steps {
        allowed.send_replace(count * step / steps);
        wait_for("a part of the traffic to be read", RUN, async || {
            let cursor: Result<Option<String>, _> = redis::cmd("GET")
                .arg(CURSOR)
                .query_async(
                    &mut crate::support::connect_to_redis(redis.url()).await.map_err(|e| e.to_string())?,
                )
                .await;
            let cursor = cursor.map_err(|error| error.to_string())?.unwrap_or_default();
            let cursor: usize = cursor.parse().unwrap_or(0);
            if cursor + 20 >= count * step / steps { Ok(()) } else { Err(format!("{cursor}")) }
        })
        .await;
        match step % 3 {
            0 => {
                program.signal(Signal::Kill);
                assert_eq!(program.wait_exit(Duration::from_secs(10)).await, 128 + 9);
                program = Standpipe::start(&["run"], &variables);
            }
            1 => {
                redis.sigkill().await.unwrap();
                assert!(redis.truncate_aof_tail(rng.u64(1..50_000)).unwrap() > 0);
                redis.start_again().await.unwrap();
            }
            _ => {
                postgres.sigkill().await.unwrap();
                postgres.start_again().await.unwrap();
            }
        }
    }
    healed(&redis, &database, &members, count).await;
    let repaired = "SELECT count(*) FROM standpipe.repos WHERE healed > 0 OR deleted > 0";
    assert_ne!(query_value(&database, repaired).await, "0", "nothing had to be repaired");

    // Everything that was lost arrives after all.
    allowed.send_replace(last);
    healed(&redis, &database, &members, last).await;
    program.signal(Signal::Term);
    assert_eq!(program.wait_exit(Duration::from_mins(1)).await, 0, "{}", program.output());
    let audit = Standpipe::run(&["audit"], &variables, RUN).await;
    assert_eq!(audit.code, 0, "{}{}", audit.stdout, audit.stderr);
    // A commit that arrives after its account has changed its key is not believed, and not needed.
    let letters: Vec<(String, BTreeMap<String, String>)> =
        redis_command(&redis, &["XRANGE", &format!("{STREAM}:dead"), "-", "+"]).await;
    let others: Vec<_> = letters.iter().filter(|(_, letter)| letter["reason"] != "unproven").collect();
    assert!(others.is_empty(), "{others:?}");
}

/// Waits until the tables are what the accounts have, and the queue is empty.
async fn healed(redis: &Redis, database: &str, members: &[Member], position: usize) {
    let limit = Duration::from_mins(3);
    wait_until(&format!("everything up to {position} to be read"), limit, async || {
        let cursor: Option<String> = redis_command(redis, &["GET", CURSOR]).await;
        cursor.is_some_and(|cursor| cursor == position.to_string())
    })
    .await;
    let expected = expected(members);
    wait_for("the tables to be what the accounts have", limit, async || {
        // A repository that was just repaired is left alone for a minute: not here.
        let waiting = query_rows(
            database,
            "UPDATE standpipe.repos SET retry_at = least(retry_at, now() + interval '1 second')
             WHERE state <> 'synced' RETURNING did, reason, message",
        )
        .await;
        let noted: u64 = redis_command(redis, &["HLEN", &format!("{STREAM}:repairs")]).await;
        let unchecked: u64 = redis_command(redis, &["HLEN", &format!("{STREAM}:unchecked")]).await;
        let found = found(database).await;
        let missing: Vec<_> = expected.difference(&found).take(3).collect();
        let extra: Vec<_> = found.difference(&expected).take(3).collect();
        if missing.is_empty() && extra.is_empty() && waiting.is_empty() && noted == 0 && unchecked == 0 {
            Ok(())
        } else {
            Err(format!("{noted} noted, {unchecked} unchecked, missing {missing:?}, extra {extra:?}, waiting {waiting:?}"))
        }
    })
    .await;
}
