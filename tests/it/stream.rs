//! Single steps on the stream: what each refuses, and what it leaves behind.

use crate::support::Redis;
use crate::support::by_hand::{ByHand, append, pending_ids};
use crate::support::chain::{GROUP, STREAM, redis_command};
use standpipe::event::{Reason, Reject, Rejected};
use standpipe::stream::Keys;
use standpipe::stream::append::{AppendError, Appendix, Budget, Move, NewEntry};
use standpipe::stream::dead_letters::Buried;

/// Each refusal protects against another reader: what it read since must not be appended twice, or skipped.
#[tokio::test(flavor = "multi_thread")]
async fn an_append_changes_nothing_without_the_lease_with_another_cursor_or_without_the_stream() {
    let mut stream = ByHand::start().await;
    stream.append(1..=3).await;
    let entry = || vec![NewEntry { event_type: "commit", data: "{}".to_owned(), seq: 4 }];
    let length = async |redis: &Redis| redis_command::<u64>(redis, &["XLEN", STREAM]).await;

    let _: String = redis_command(&stream.redis, &["SET", &stream.keys.lease, "another reader's"]).await;
    let refused = append(&mut stream.ours, Some(3), 4, entry()).await;
    assert!(matches!(refused, Err(AppendError::LeaseLost)), "{refused:?}");
    let _: u64 = redis_command(&stream.redis, &["DEL", &stream.keys.lease]).await;
    let refused = append(&mut stream.ours, Some(3), 4, entry()).await;
    assert!(matches!(refused, Err(AppendError::LeaseLost)), "{refused:?}");
    let _: String = redis_command(&stream.redis, &["SET", &stream.keys.lease, ByHand::LEASE]).await;

    let refused = append(&mut stream.ours, Some(2), 4, entry()).await;
    assert!(matches!(refused, Err(AppendError::CursorMoved)), "{refused:?}");
    assert_eq!((length(&stream.redis).await, stream.cursor().await), (3, Some(3)));

    let _: u64 = redis_command(&stream.redis, &["DEL", STREAM]).await;
    let refused = append(&mut stream.ours, Some(3), 4, entry()).await;
    assert!(matches!(refused, Err(AppendError::StreamGone)), "{refused:?}");
    assert_eq!(stream.cursor().await, Some(3));
}

/// Another program took over an entry and acknowledged it: a dead letter would be about something that is applied.
#[tokio::test(flavor = "multi_thread")]
async fn an_entry_that_somebody_else_acknowledged_leaves_no_dead_letter() {
    let mut stream = ByHand::start().await;
    stream.append(1..=2).await;
    let read = stream.ours.read_new("one", 2, false).await.unwrap().entries;
    assert_eq!(
        redis_command::<u64>(&stream.redis, &["XACK", STREAM, GROUP, &read[0].id.to_string()]).await,
        1
    );
    let reject = Reject::new(Reason::InvalidField, "wrong");
    let bad = [Rejected { reject, op: "{}".to_owned() }];
    assert_eq!(stream.ours.bury(&read[0], &bad, 1_000_000).await.unwrap(), Buried::Already);
    assert_eq!(stream.ours.bury(&read[1], &bad, 1_000_000).await.unwrap(), Buried::Done);
    assert_eq!(redis_command::<u64>(&stream.redis, &["XLEN", &stream.keys.dead]).await, 1);
    assert!(pending_ids(&stream.redis).await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_trimmed_that_another_group_has_not_acknowledged() {
    let mut stream = ByHand::start().await;
    // Redis trims whole nodes.
    let _: String = redis_command(&stream.redis, &["CONFIG", "SET", "stream-node-max-entries", "1"]).await;
    stream.append(1..=10).await;
    stream.deliver("10").await;
    stream.acknowledge_all().await;
    let _: String = redis_command(&stream.redis, &["XGROUP", "CREATE", STREAM, "analytics", "0"]).await;
    let look = stream.sweep().await;
    assert_eq!((look.length, look.trimmed, &*look.held_by), (10, 0, "analytics"), "it has read nothing");
    let read = ["XREADGROUP", "GROUP", "analytics", "one", "COUNT", "6", "STREAMS", STREAM, ">"];
    let _: redis::Value = redis_command(&stream.redis, &read).await;
    let pending: Vec<(String, String, u64, u64)> =
        redis_command(&stream.redis, &["XPENDING", STREAM, "analytics", "-", "+", "100"]).await;
    for (id, ..) in &pending[..4] {
        assert_eq!(redis_command::<u64>(&stream.redis, &["XACK", STREAM, "analytics", id]).await, 1);
    }
    let look = stream.sweep().await;
    assert_eq!((look.trimmed, &*look.held_by), (4, "analytics"), "it has two in hand, and four to read");
    let first: Vec<(String, Vec<String>)> =
        redis_command(&stream.redis, &["XRANGE", STREAM, "-", "+", "COUNT", "1"]).await;
    assert_eq!(first[0].0, pending[4].0);
}

/// What is acknowledged behind an entry that is not stays in the stream, and so counts towards its length.
#[tokio::test(flavor = "multi_thread")]
async fn only_what_could_be_trimmed_does_not_count_towards_the_length() {
    let mut stream = ByHand::start().await;
    let waiting = async |stream: &mut ByHand| {
        let believed = stream.cursor().await;
        append(&mut stream.ours, believed, believed.unwrap(), vec![]).await.unwrap().length
    };
    stream.append(1..=10).await;
    stream.deliver("10").await;
    let pending = pending_ids(&stream.redis).await;
    let acknowledge = async |stream: &ByHand, ids: &[String]| {
        for id in ids {
            assert_eq!(redis_command::<u64>(&stream.redis, &["XACK", STREAM, GROUP, id]).await, 1);
        }
    };
    acknowledge(&stream, &pending[1..]).await;
    assert_eq!(stream.sweep().await.acknowledged, 0, "the first one is pending");
    assert_eq!(waiting(&mut stream).await, 10);
    stream.append(11..=20).await;
    stream.deliver("10").await;
    acknowledge(&stream, &pending[..1]).await;
    // Ten had been received when it looked last, and nothing before the eleventh is pending.
    assert_eq!(stream.sweep().await.acknowledged, 10);
    assert_eq!(waiting(&mut stream).await, 10);
    stream.acknowledge_all().await;
    assert_eq!(stream.sweep().await.acknowledged, 20);
    assert_eq!(waiting(&mut stream).await, 0);
}

/// The numbers of the new relay may be lower: what is waiting from the old one says nothing about them.
#[tokio::test(flavor = "multi_thread")]
async fn after_a_relay_change_the_position_to_go_back_to_is_one_of_the_new_relay() {
    let mut stream = ByHand::start().await;
    stream.append(100..=110).await;
    assert_eq!(stream.acked().await, Some(99));
    let entry = NewEntry { event_type: "commit", data: "{}".to_owned(), seq: 3 };
    let to = Move { token: ByHand::LEASE, relay: "another", epoch: 2, believed: Some(110), position: 3 };
    let budget = Budget { bytes: 1_000_000, per_account: 100 };
    let what = Appendix { entries: vec![entry], ..Appendix::default() };
    stream.ours.append(to, budget, &what).await.unwrap();
    assert_eq!((stream.cursor().await, stream.acked().await), (Some(3), Some(2)));
    // Nothing of either relay is acknowledged.
    stream.sweep().await;
    assert_eq!(stream.acked().await, Some(2));
}

/// The budget is for what is kept: after another attempt a letter has another size, and after a removal none.
#[tokio::test(flavor = "multi_thread")]
async fn the_size_of_the_dead_letters_is_that_of_those_kept() {
    let mut stream = ByHand::start().await;
    stream.append(1..=2).await;
    for entry in stream.ours.read_new("one", 2, false).await.unwrap().entries {
        let reject = Reject::new(Reason::InvalidField, "wrong");
        let bad = [Rejected { reject, op: "{}".to_owned() }];
        assert_eq!(stream.ours.bury(&entry, &bad, 1_000_000).await.unwrap(), Buried::Done);
    }
    let kept = async |redis: &Redis, keys: &Keys| {
        let letters: Vec<(String, Vec<String>)> =
            redis_command(redis, &["XRANGE", &keys.dead, "-", "+"]).await;
        let size: usize = letters.iter().flat_map(|(_, fields)| fields).map(String::len).sum();
        let counted: usize = redis_command(redis, &["GET", &keys.dead_bytes()]).await;
        assert_eq!(counted, size);
        (letters.into_iter().map(|(id, _)| id).collect::<Vec<_>>(), size)
    };
    let (ids, before) = kept(&stream.redis, &stream.keys).await;
    let letter = stream.ours.dead_letter(&ids[0]).await.unwrap().unwrap();
    let reject = Reject::new(Reason::InvalidField, "wrong for a reason that takes longer to explain");
    assert!(stream.ours.update_dead_letter(letter, &reject).await.unwrap());
    let (ids, after) = kept(&stream.redis, &stream.keys).await;
    assert!(after > before, "{after} bytes after another attempt, {before} before");
    for id in &ids {
        let letter = stream.ours.dead_letter(id).await.unwrap().unwrap();
        assert!(stream.ours.remove_dead_letter(&letter).await.unwrap());
    }
    assert_eq!(kept(&stream.redis, &stream.keys).await, (Vec::new(), 0));
}

/// A refill goes back for what PostgreSQL has lost, but events before that may be unacknowledged again, because
/// others had removed them.
#[tokio::test(flavor = "multi_thread")]
async fn a_refill_never_moves_the_acknowledged_position_forward() {
    for (acked, afterwards) in [("2", 2), ("8", 5)] {
        let mut stream = ByHand::start().await;
        stream.append(1..=10).await;
        let _: String = redis_command(&stream.redis, &["SET", &stream.keys.acked, acked]).await;
        let found = stream.ours.noted().await.unwrap();
        assert!(stream.ours.refill(&found, 5, 1, "another server", None).await.unwrap());
        assert_eq!(stream.acked().await, Some(afterwards));
        let again = stream.ours.refill(&found, 5, 1, "another server", None).await.unwrap();
        assert!(!again, "two workers went back for the same loss");
    }
}
