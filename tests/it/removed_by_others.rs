//! Entries that someone else removes from the stream are read again: between two sweeps of the janitor
//! anything may happen to a stream that is appended to, delivered and acknowledged.

use std::collections::BTreeSet;

use crate::support::by_hand::{ByHand, append, pending_ids};
use crate::support::chain::{GROUP, STREAM, redis_command};
use standpipe::event::Entry;
use standpipe::stream::append::{AppendError, NewEntry};
use standpipe::stream::{Keys, Stream, is_nogroup, janitor};

/// Entries trimmed before delivery are found although later ones have been delivered since.
#[tokio::test(flavor = "multi_thread")]
async fn entries_trimmed_before_delivery_are_found_by_the_next_sweep() {
    let mut stream = ByHand::start().await;
    stream.append(1..=10).await;
    stream.deliver("3").await;
    assert_eq!(stream.sweep().await.removed, 0);
    assert_eq!(stream.acked().await, Some(0));
    assert_eq!(stream.trim_to("0").await, 10);
    stream.append(11..=15).await;
    stream.deliver("2").await;
    let look = stream.sweep().await;
    assert_eq!((look.removed, look.set_back), (10, true), "3 that were pending, 7 that were not delivered");
    assert_eq!((stream.cursor().await, stream.acked().await), (Some(0), Some(0)));
    // Only once.
    assert_eq!(stream.sweep().await.removed, 0);
    assert_eq!(stream.acked().await, Some(0), "the group is not past what stood there then");

    assert_eq!(stream.trim_to("3").await, 2);
    assert_eq!(stream.sweep().await.removed, 2, "they were pending");
}

/// The first sweep finds entries that were trimmed before it, just as later sweeps do.
#[tokio::test(flavor = "multi_thread")]
async fn entries_trimmed_before_the_first_sweep_are_found() {
    let mut stream = ByHand::start().await;
    for delivered in ["0", "2", "5"] {
        stream.afresh().await;
        stream.append(1..=10).await;
        assert_eq!(stream.trim_to("0").await, 10);
        stream.append(11..=15).await;
        if delivered != "0" {
            stream.deliver(delivered).await;
            stream.acknowledge_all().await;
        }
        let look = stream.sweep().await;
        assert_eq!((look.removed, look.set_back), (10, true), "{delivered} delivered");
        assert_eq!(
            (stream.cursor().await, stream.acked().await),
            (Some(0), Some(0)),
            "{delivered} delivered"
        );
    }
}

/// Redis then refuses almost every write, but not those that free memory.
#[tokio::test(flavor = "multi_thread")]
async fn entries_trimmed_while_memory_is_full_are_found() {
    let mut stream = ByHand::start().await;
    stream.append(1..=300).await;
    stream.deliver("250").await;
    stream.acknowledge_all().await;
    let _: String = redis_command(&stream.redis, &["CONFIG", "SET", "maxmemory", "1"]).await;
    let full = redis::cmd("SET")
        .arg("something")
        .arg(1)
        .query_async::<()>(&mut stream.redis.connection().await)
        .await;
    assert_eq!(full.unwrap_err().code(), Some("OOM"));
    // The janitor does not mistake its own trimming for someone else's.
    let look = stream.sweep().await;
    assert!(look.trimmed > 0);
    assert_eq!((look.removed, stream.sweep().await.removed), (0, 0));
    assert_eq!(stream.acked().await, Some(250));
    assert_eq!(stream.trim_to("10").await, look.length - 10);
    let look = stream.sweep().await;
    assert!(look.removed >= 40 && look.set_back, "{look:?}");
    assert_eq!(stream.cursor().await, Some(250));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_among_waiting_entries_is_found() {
    let mut stream = ByHand::start().await;
    stream.append(1..=10).await;
    stream.deliver("3").await;
    assert_eq!(stream.sweep().await.removed, 0);
    let all: Vec<(String, Vec<String>)> = redis_command(&stream.redis, &["XRANGE", STREAM, "-", "+"]).await;
    assert_eq!(redis_command::<u64>(&stream.redis, &["XDEL", STREAM, &all[6].0]).await, 1);
    let look = stream.sweep().await;
    assert_eq!((look.removed, look.set_back), (1, true));
    assert_eq!(stream.cursor().await, Some(0));
}

/// Others create a stream under the same name before anyone has noticed that ours is gone.
#[tokio::test(flavor = "multi_thread")]
async fn a_replaced_stream_is_detected() {
    let mut stream = ByHand::start().await;
    stream.append(1..=10).await;
    stream.deliver("3").await;
    stream.acknowledge_all().await;
    assert_eq!(stream.sweep().await.removed, 0);
    assert_eq!(redis_command::<u64>(&stream.redis, &["DEL", STREAM]).await, 1);
    let _: String = redis_command(&stream.redis, &["XGROUP", "CREATE", STREAM, GROUP, "0", "MKSTREAM"]).await;
    stream.append(11..=15).await;
    assert!(stream.sweep().await.set_back);
    assert_eq!(stream.cursor().await, Some(3));
}

#[tokio::test(flavor = "multi_thread")]
async fn acknowledged_entries_may_be_trimmed_by_anyone() {
    let mut stream = ByHand::start().await;
    stream.append(1..=10).await;
    stream.deliver("6").await;
    stream.acknowledge_all().await;
    assert_eq!(stream.sweep().await.removed, 0);
    assert_eq!(stream.trim_to("4").await, 6);
    stream.append(11..=12).await;
    assert_eq!(stream.sweep().await.removed, 0, "seven is the first that was not acknowledged, and is there");

    stream.deliver("6").await;
    stream.acknowledge_all().await;
    assert_eq!(stream.sweep().await.removed, 0);
    assert_eq!(stream.trim_to("0").await, 6);
    stream.append(13..=20).await;
    let look = stream.sweep().await;
    assert_eq!((look.removed, look.set_back), (0, false), "all were acknowledged");
    assert_eq!(stream.acked().await, Some(12));
}

/// As a worker does that does not have the reader's `REDIS_CURSOR_KEY`.
#[tokio::test(flavor = "multi_thread")]
async fn trimming_by_another_standpipe_process_is_not_counted_as_loss() {
    let mut stream = ByHand::start().await;
    let key = |name: &str| format!("another:{name}");
    let others = Keys {
        cursor: key("cursor"),
        relay: key("relay"),
        acked: key("acked"),
        start: key("start"),
        watch: key("watch"),
        ..stream.keys.clone()
    };
    let mut others = Stream::over(stream.redis.connection().await, others);
    let (mut appended, mut trimmed) = (0, 0);
    for _ in 0..3 {
        stream.append(appended + 1..=appended + 300).await;
        appended += 300;
        stream.deliver("300").await;
        stream.acknowledge_all().await;
        for _ in 0..3 {
            let look = others.sweep(janitor::Keep::Nothing, None).await.unwrap();
            assert_eq!((look.removed, look.set_back), (0, false));
            trimmed += look.trimmed;
        }
        let look = stream.sweep().await;
        assert_eq!((look.removed, look.set_back, stream.acked().await), (0, false, Some(appended)));
    }
    assert!(trimmed > 600, "{trimmed}");
    stream.append(appended + 1..=appended + 10).await;
    let all = stream.trim_to("0").await;
    let _ = others.sweep(janitor::Keep::Nothing, None).await.unwrap();
    let look = stream.sweep().await;
    assert_eq!((look.removed, look.set_back), (all, true));
}

/// An entry in the middle, while memory is full, whose deletion only its consumer finds.
#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_pending_entry_is_given_up_when_memory_is_full() {
    let mut stream = ByHand::start().await;
    stream.append(1..=5).await;
    stream.deliver("5").await;
    let pending = pending_ids(&stream.redis).await;
    assert_eq!(redis_command::<u64>(&stream.redis, &["XDEL", STREAM, &pending[2]]).await, 1);
    let _: String = redis_command(&stream.redis, &["CONFIG", "SET", "maxmemory", "1"]).await;
    let ours = &mut stream.ours;
    let batch = ours.read_pending("one", 10, "0-0".parse().unwrap()).await.unwrap();
    assert_eq!((batch.entries.len(), batch.gone.len()), (4, 1));
    ours.give_up(&batch.gone).await.unwrap();
    assert_eq!(pending_ids(&stream.redis).await.len(), 4);
    assert!(stream.sweep().await.set_back);
    assert_eq!(stream.cursor().await, Some(0));
}

/// Someone who trims the stream every second causes repetition, but does not hold everything up.
#[tokio::test(flavor = "multi_thread")]
async fn continuous_trimming_does_not_hold_up_the_reader_forever() {
    let mut stream = ByHand::start().await;
    let mut now = 0;
    let mut sets_back = 0;
    let mut furthest = 0;
    for second in 0..300 {
        let next = stream.cursor().await.unwrap_or(0) + 1;
        if second >= 240 {
            furthest = furthest.max(next);
        }
        stream.append(next..=next + 9).await;
        stream.deliver("100").await;
        stream.acknowledge_all().await;
        let _ = stream.trim_to("0").await;
        // For the janitor, a second passes.
        let back_ms: Option<u64> =
            redis_command(&stream.redis, &["HGET", &stream.keys.watch, "back_ms"]).await;
        if let Some(back_ms) = back_ms {
            let earlier = (back_ms - 1_000).to_string();
            let _: u64 =
                redis_command(&stream.redis, &["HSET", &stream.keys.watch, "back_ms", &earlier]).await;
        }
        if stream.sweep().await.set_back {
            sets_back += 1;
            now = second;
        }
    }
    assert!((3..=6).contains(&sets_back), "{sets_back}, the last after {now} s");
    // Not where it is now: it may have been set back a moment ago.
    assert!(furthest >= 300, "{furthest}");
}

/// The server's own count of waiting entries still includes those trimmed before delivery.
#[tokio::test(flavor = "multi_thread")]
async fn trimmed_entries_do_not_count_as_waiting_forever() {
    let mut stream = ByHand::start().await;
    stream.append(1..=10).await;
    stream.deliver("3").await;
    assert_eq!(stream.trim_to("5").await, 5);
    stream.deliver("5").await;
    stream.acknowledge_all().await;
    let look = stream.sweep().await;
    assert_eq!((look.oldest_waiting, look.lag), (None, Some(0)));
    stream.append(11..=14).await;
    assert_eq!(stream.sweep().await.lag, Some(4));
}

/// A relay, a reader and one consumer, one step at a time. Others remove whatever they like.
struct Simulated {
    stream: ByHand,
    rng: fastrand::Rng,
    /// The newest event of the relay; the first is 1.
    newest: i64,
    /// Whether the relay resends the event at the cursor. Both kinds of relay exist.
    inclusive: bool,
    /// The reader's cursor and the next event it gets; `None` if it is not connected.
    reader: Option<(Option<i64>, i64)>,
    in_hand: Vec<Entry>,
    applied: BTreeSet<i64>,
    done: Vec<String>,
}

impl Simulated {
    async fn read(&mut self, at_most: i64) {
        if self.reader.is_none() {
            self.ensure().await;
            let cursor = self.stream.cursor().await;
            let next = cursor.map_or(1, |cursor| if self.inclusive { cursor.max(1) } else { cursor + 1 });
            self.reader = Some((cursor, next));
        }
        let Some((believed, next)) = self.reader else { return };
        let last = (next + at_most - 1).min(self.newest);
        if last < next {
            // It checks the cursor even when the relay has nothing to send.
            if self.stream.cursor().await != believed {
                self.reader = None;
            }
            return;
        }
        let position = believed.unwrap_or(0).max(last);
        // Every seventh event is not wanted.
        let entries: Vec<NewEntry> = (next..=last)
            .filter(|seq| seq % 7 != 0)
            .map(|seq| NewEntry { event_type: "commit", data: "{}".to_owned(), seq })
            .collect();
        let ours = &mut self.stream.ours;
        let appended = append(ours, believed, position, entries).await;
        self.done.push(format!("append {next} to {last}: {appended:?}"));
        self.reader = match appended {
            Ok(_) => Some((Some(position), last + 1)),
            Err(AppendError::CursorMoved | AppendError::StreamGone) => None,
            Err(error) => panic!("{error}"),
        };
    }

    async fn deliver(&mut self, count: usize, pending: bool) {
        let ours = &mut self.stream.ours;
        let batch = if pending {
            ours.read_pending("one", count, "0-0".parse().unwrap()).await
        } else {
            ours.read_new("one", count, false).await
        };
        match batch {
            Ok(batch) => {
                ours.give_up(&batch.gone).await.unwrap();
                self.done
                    .push(format!("deliver {:?}", batch.entries.iter().map(|e| &e.seq).collect::<Vec<_>>()));
                self.in_hand.extend(batch.entries);
            }
            Err(error) if is_nogroup(&error) => self.ensure().await,
            Err(error) => panic!("{error}"),
        }
    }

    async fn finish(&mut self) {
        let ids: Vec<_> = self.in_hand.iter().map(|entry| entry.id).collect();
        self.done.push(format!("finish {}", ids.len()));
        self.applied.extend(self.in_hand.drain(..).map(|entry| entry.seq.parse::<i64>().unwrap()));
        let ours = &mut self.stream.ours;
        ours.acknowledge(&ids).await.unwrap();
    }

    async fn sweep(&mut self, later: bool) -> janitor::Look {
        if later {
            // As if the time between two set-backs had passed.
            let _: u64 =
                redis_command(&self.stream.redis, &["HDEL", &self.stream.keys.watch, "back_ms"]).await;
        }
        let look = self.stream.sweep().await;
        self.done.push(format!("sweep: {} removed, set back {}", look.removed, look.set_back));
        if !look.exists || !look.group {
            self.ensure().await;
        }
        look
    }

    async fn ensure(&mut self) {
        let ours = &mut self.stream.ours;
        let ensured = ours.ensure().await.unwrap();
        self.done.push(format!("{ensured:?}"));
    }

    async fn others(&mut self) {
        let redis = &self.stream.redis;
        let what: Vec<String> = match self.rng.u32(0..8) {
            0..3 => ["XTRIM", STREAM, "MAXLEN", &self.rng.u32(0..4).to_string()].map(str::to_owned).to_vec(),
            3..5 => {
                let all: Vec<(String, Vec<String>)> =
                    redis_command(redis, &["XRANGE", STREAM, "-", "+"]).await;
                let Some((id, _)) = self.rng.choice(&all) else { return };
                ["XDEL", STREAM, id].map(str::to_owned).to_vec()
            }
            5 => ["DEL", STREAM].map(str::to_owned).to_vec(),
            6 => ["XGROUP", "DESTROY", STREAM, GROUP].map(str::to_owned).to_vec(),
            _ => {
                let _: u64 = redis_command(redis, &["DEL", STREAM]).await;
                ["XGROUP", "CREATE", STREAM, GROUP, "0", "MKSTREAM"].map(str::to_owned).to_vec()
            }
        };
        let words: Vec<&str> = what.iter().map(String::as_str).collect();
        let mut command = redis::cmd(words[0]);
        command.arg(&words[1..]);
        // Without a stream or group there is nothing to remove.
        let answer: redis::RedisResult<redis::Value> =
            command.query_async(&mut self.stream.redis.connection().await).await;
        self.done.push(format!("{}: {answer:?}", what.join(" ")));
    }

    async fn step(&mut self) {
        match self.rng.u32(0..48) {
            0..6 => self.newest += self.rng.i64(1..20),
            6..16 => {
                let at_most = *self.rng.choice(&[1, 1, 3, 10, 50]).unwrap();
                self.read(at_most).await;
            }
            16..26 if self.in_hand.is_empty() => {
                let count = *self.rng.choice(&[1, 2, 5, 30]).unwrap();
                self.deliver(count, false).await;
            }
            26..35 => self.finish().await,
            35 => {
                // The consumer dies and comes back under the same name.
                self.in_hand.clear();
                self.deliver(1_000, true).await;
            }
            36..45 => {
                let later = self.rng.bool();
                self.sweep(later).await;
            }
            45 => self.others().await,
            _ => {}
        }
    }

    /// Lets everything finish, with nobody removing anything any more.
    async fn settle(&mut self) {
        for _ in 0..100 {
            self.read(1_000).await;
            self.in_hand.clear();
            self.deliver(1_000, true).await;
            self.finish().await;
            self.deliver(1_000, false).await;
            self.finish().await;
            let look = self.sweep(true).await;
            let ByHand { redis, keys, .. } = &self.stream;
            let fields: Vec<Option<String>> =
                redis_command(redis, &["HMGET", &keys.watch, "due", "hold", "unacked"]).await;
            if look.is_drained()
                && !look.set_back
                && fields.iter().all(Option::is_none)
                && self.reader.is_some_and(|(cursor, next)| next > self.newest && cursor == Some(self.newest))
                && self.stream.cursor().await == Some(self.newest)
            {
                return;
            }
        }
        let watch: Vec<String> =
            redis_command(&self.stream.redis, &["HGETALL", &self.stream.keys.watch]).await;
        let done = self.done.join("\n");
        panic!(
            "it does not come to rest: {watch:?}, reader {:?}, newest {}\n{done}",
            self.reader, self.newest
        );
    }
}

/// `STANDPIPE_SEED` selects the cases, `STANDPIPE_CASES` sets their number.
#[tokio::test(flavor = "multi_thread")]
async fn every_event_is_applied_whatever_others_remove() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let first = number("STANDPIPE_SEED").unwrap_or_else(|| fastrand::u64(..));
    let cases = number("STANDPIPE_CASES").unwrap_or(60);
    println!("STANDPIPE_SEED={first} STANDPIPE_CASES={cases}");
    let mut stream = ByHand::start().await;
    let mut set_back = 0;
    for case in 0..cases {
        let seed = first.wrapping_add(case);
        stream.afresh().await;
        let rng = fastrand::Rng::with_seed(seed);
        let mut simulated = Simulated {
            stream,
            rng,
            newest: 0,
            inclusive: seed % 2 == 0,
            reader: None,
            in_hand: Vec::new(),
            applied: BTreeSet::new(),
            done: Vec::new(),
        };
        for _ in 0..250 {
            simulated.step().await;
        }
        simulated.newest += 1 + i64::from(simulated.newest % 7 == 6);
        simulated.settle().await;
        let missing: Vec<i64> =
            (1..=simulated.newest).filter(|seq| seq % 7 != 0 && !simulated.applied.contains(seq)).collect();
        assert!(missing.is_empty(), "STANDPIPE_SEED={seed}: {missing:?}\n{}", simulated.done.join("\n"));
        set_back += simulated.done.iter().filter(|line| line.ends_with("set back true")).count();
        stream = simulated.stream;
    }
    assert!(set_back > 0, "nothing was lost in any of the cases");
}
