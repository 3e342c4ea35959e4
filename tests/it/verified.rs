//! Verification in the real program: what an account has not signed never reaches the tables, what cannot be checked is
//! checked later, and what is missing upstream is noticed.

use std::collections::BTreeMap;

use crate::support::chain::{DEAD, Program, RUN, SOON, redis_command};
use crate::support::scripted::{Op, delete, identity, rev};
use crate::support::signed::{Plc, Signed};
use crate::support::stage::{Frames, Stage, path, write};
use crate::support::{Signal, query_rows, wait_for, wait_until};

/// Repairs would change what is looked at here.
const NO_REPAIRS: (&str, &str) = ("REPAIR_CONCURRENCY", "0");

/// A frame with some bytes replaced by others of the same length.
fn replaced(mut frame: Vec<u8>, from: &[u8], to: &[u8]) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let at = frame.windows(from.len()).position(|bytes| bytes == from).expect("the bytes are in the frame");
    frame[at..at + to.len()].copy_from_slice(to);
    frame
}

#[tokio::test(flavor = "multi_thread")]
async fn signed_commits_of_both_curves_are_applied_and_proven() {
    let plc = Plc::start().await;
    let mut accounts: Vec<Signed> = (0..20).map(Signed::new).collect();
    let mut frames = Frames::default();
    for round in 0..10_u64 {
        for (number, account) in accounts.iter_mut().enumerate() {
            let name = format!("{number:02}-{round}");
            let mut ops = vec![write(&name)];
            if round == 5 {
                ops.push(delete(&path(&format!("{number:02}-3"))));
            }
            frames.commit(account, &ops);
        }
    }
    for account in &mut accounts {
        plc.publish(account);
        frames.push(|seq, rev| account.sync(seq, rev));
    }
    let count = frames.0.len();
    let mut stage = Stage::start(plc, frames.0, &[NO_REPAIRS]).await;
    stage.send(20).await;
    stage.all_checked().await;
    stage.send(count - 20).await;
    stage.all_checked().await;
    assert_eq!(stage.texts().await.len(), 20 * 9);
    assert_eq!(stage.repairs().await, BTreeMap::new());
    assert_eq!(stage.verified("valid").await, 200.0);
    assert_eq!((stage.verified("unchecked").await, stage.verified("proved_later").await), (20.0, 20.0));
    // Each account was looked up once, or, where its handle came first, twice.
    assert!((20..=40).contains(&stage.plc.requests()), "{}", stage.plc.requests());
}

/// What is done to a commit.
type Tamper = fn(&Signed, i64, &str) -> Vec<u8>;

#[tokio::test(flavor = "multi_thread")]
async fn nothing_of_a_tampered_commit_reaches_the_tables() {
    let plc = Plc::start().await;
    let tamperings: &[(&str, Tamper)] = &[
        ("archive", |account, seq, rev| {
            let frame = account.clone().commit(seq, rev, &[write("evil")]);
            replaced(frame, b"dtextdevil", b"dtextdEVIL")
        }),
        ("operations", |account, seq, rev| {
            let frame = account.clone().commit(seq, rev, &[write("evil"), write("evi2")]);
            replaced(frame, b"dpathwapp.bsky.feed.post/evi2", b"dpathwapp.bsky.feed.post/EVI2")
        }),
        ("commit", |account, seq, rev| {
            let other = Signed::new(900);
            let frame = account.clone().commit(seq, rev, &[write("evil")]);
            let (from, to) = (format!("drepox {}", account.did), format!("drepox {}", other.did));
            replaced(frame, from.as_bytes(), to.as_bytes())
        }),
        ("signature", |account, seq, rev| {
            let mut foreign = account.clone();
            foreign.rotate(901);
            foreign.commit(seq, rev, &[write("evil")])
        }),
        ("revision", |account, seq, _| account.clone().commit(seq, "bzzzzzzzzzzzz", &[write("evil")])),
        ("size", |account, seq, rev| {
            let ops: Vec<Op> = (0..201).map(|n| write(&format!("evil{n}"))).collect();
            account.clone().commit(seq, rev, &ops)
        }),
    ];
    let mut frames = Frames::default();
    let mut accounts: Vec<Signed> = (0..).map(Signed::new).take(tamperings.len()).collect();
    for account in &mut accounts {
        plc.publish(account);
        frames.commit(account, &[write("before")]);
    }
    for (account, (_, tamper)) in accounts.iter().zip(tamperings) {
        frames.push(|seq, rev| tamper(account, seq, rev));
    }
    // The accounts go on as if nothing had happened.
    for account in &mut accounts {
        frames.commit(account, &[write("after")]);
    }
    let count = tamperings.len();
    let mut stage = Stage::start(plc, frames.0, &[NO_REPAIRS]).await;
    stage.send(count).await;
    stage.all_checked().await;
    stage.send(2 * count).await;
    let mut expected = vec!["after"; count];
    expected.extend(vec!["before"; count]);
    assert_eq!(stage.texts().await, expected);
    let repairs = stage.repairs().await;
    for (account, (fault, _)) in accounts.iter().zip(tamperings) {
        // A commit in another account's name is that account's fault.
        let did = if *fault == "commit" { Signed::new(900).did } else { account.did.clone() };
        assert_eq!(repairs.get(&did).map(String::as_str), Some(*fault), "{repairs:?}");
        assert_eq!(stage.verified(fault).await, 1.0, "{fault}");
    }
    // Each of them is told about, without its records.
    let letters: Vec<(String, Vec<(String, String)>)> =
        redis_command(&stage.chain.redis, &["XRANGE", DEAD, "-", "+"]).await;
    assert_eq!(letters.len(), count, "{letters:#?}");
    for (_, fields) in letters {
        let fields: BTreeMap<String, String> = fields.into_iter().collect();
        assert_eq!(fields["reason"], "unproven");
        assert!(fields["op"].contains("evi"), "{fields:?}");
    }
    stage.program.metric_with_is("standpipe_relay_missed_total", "withheld", count as f64).await;
    // The commits that were withheld are no part of the chain: nothing is missing.
    assert_eq!(stage.program.metric_with("standpipe_relay_missed_total", "broken_chain").await, 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn with_log_tampering_is_counted_and_nothing_withheld() {
    let plc = Plc::start().await;
    let mut account = Signed::new(1);
    plc.publish(&account);
    let first = account.commit(1, &rev(1), &[write("before")]);
    let mut foreign = account.clone();
    foreign.rotate(7);
    let second = foreign.commit(2, &rev(2), &[write("evil")]);
    let mut stage = Stage::start(plc, vec![(1, first), (2, second)], &[NO_REPAIRS, ("VERIFY", "log")]).await;
    stage.send(1).await;
    stage.all_checked().await;
    stage.send(1).await;
    assert_eq!(stage.texts().await, ["before", "evil"]);
    assert_eq!(stage.verified("signature").await, 1.0);
    assert_eq!(stage.repairs().await, BTreeMap::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_lost_upstream_is_noticed_at_its_accounts_next() {
    let plc = Plc::start().await;
    let (mut lost, mut whole, mut told) = (Signed::new(1), Signed::new(2), Signed::new(3));
    let mut frames = Frames::default();
    for account in [&mut lost, &mut whole, &mut told] {
        plc.publish(account);
        frames.commit(account, &[write("one")]);
    }
    // These two never arrive.
    lost.commit(0, &rev(10), &[write("lost")]);
    told.commit(0, &rev(10), &[write("lost")]);
    frames.push(|seq, _| lost.commit(seq, &rev(20), &[write("two")]));
    frames.push(|seq, _| whole.commit(seq, &rev(20), &[write("two")]));
    frames.push(|seq, _| told.sync(seq, &rev(20)));
    // A sync that changes nothing moves the revision only: the next commit follows it.
    frames.push(|seq, _| whole.sync(seq, &rev(30)));
    frames.push(|seq, _| whole.commit(seq, &rev(40), &[write("three")]));
    let mut stage = Stage::start(plc, frames.0, &[NO_REPAIRS]).await;
    stage.send(8).await;
    stage.all_checked().await;
    // What does follow is applied all the same: it is proven by itself.
    assert_eq!(stage.texts().await, ["one", "one", "one", "three", "two", "two"]);
    let expected = [(lost.did.clone(), "chain".to_owned()), (told.did.clone(), "sync".to_owned())];
    assert_eq!(stage.repairs().await, BTreeMap::from(expected));
    stage.program.metric_with_is("standpipe_relay_missed_total", "broken_chain", 1.0).await;
    stage.program.metric_with_is("standpipe_repairs_requested_total", "sync", 1.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_that_is_down_withholds_nothing_and_everything_is_checked_when_it_is_back() {
    let plc = Plc::start().await;
    plc.set_away(true);
    let mut frames = Frames::default();
    let mut accounts: Vec<Signed> = (0..50).map(Signed::new).collect();
    for round in 0..4 {
        for account in &mut accounts {
            frames.commit(account, &[write(&format!("{round}"))]);
        }
    }
    // One account's document names another key than it signs with.
    let mut forged = accounts[7].clone();
    forged.rotate(999);
    for account in &accounts {
        plc.publish(account);
    }
    plc.publish(&forged);
    let mut stage = Stage::start(plc, frames.0, &[NO_REPAIRS]).await;
    stage.send(200).await;
    assert_eq!(stage.texts().await.len(), 200);
    assert_eq!(stage.unchecked().await, 50);
    wait_until("the directory to be asked in vain", RUN, async || {
        stage.program.metric_with("standpipe_identity_lookups_total", "away").await > 0.0
    })
    .await;
    assert_eq!(stage.unchecked().await, 50);
    stage.program.metric_is("standpipe_unchecked_accounts", 50.0).await;
    stage.plc.set_away(false);
    stage.all_checked().await;
    assert_eq!(stage.verified("proved_later").await, 49.0);
    assert_eq!(stage.verified("disproved").await, 1.0);
    assert_eq!(stage.repairs().await, BTreeMap::from([(forged.did, "signature".to_owned())]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_key_is_believed_after_the_account_says_so() {
    let plc = Plc::start().await;
    let mut account = Signed::new(1);
    plc.publish(&account);
    let first = account.commit(1, &rev(1), &[write("one")]);
    account.rotate(2);
    let told = identity(2, &account.did, None);
    let second = account.commit(3, &rev(3), &[write("two")]);
    let did = account.did.clone();
    let mut stage = Stage::start(plc, vec![(1, first), (2, told), (3, second)], &[NO_REPAIRS]).await;
    stage.send(1).await;
    stage.all_checked().await;
    stage.plc.publish(&account);
    stage.send(2).await;
    stage.all_checked().await;
    assert_eq!(stage.texts().await, ["one", "two"]);
    assert_eq!(stage.repairs().await, BTreeMap::new(), "{did}");
    // Looked up at once, because it is not signed with the old one.
    assert_eq!((stage.verified("proved_later").await, stage.verified("valid").await), (1.0, 1.0));
}

/// What is known survives a restart, and Redis answers for it.
#[tokio::test(flavor = "multi_thread")]
async fn heads_and_keys_survive_a_restart() {
    let plc = Plc::start().await;
    let mut account = Signed::new(1);
    plc.publish(&account);
    let mut frames = vec![(1, account.commit(1, &rev(1), &[write("one")]))];
    account.commit(0, &rev(2), &[write("lost")]);
    frames.push((2, account.commit(2, &rev(3), &[write("two")])));
    let mut stage = Stage::start(plc, frames, &[NO_REPAIRS]).await;
    stage.send(1).await;
    stage.all_checked().await;
    let asked = stage.plc.requests();
    stage.program.signal(Signal::Term);
    assert_eq!(stage.program.wait_exit(SOON).await, 0);
    stage.program = Program::start("run", &stage.variables).await;
    stage.send(1).await;
    stage.all_checked().await;
    assert_eq!(stage.repairs().await, BTreeMap::from([(account.did, "chain".to_owned())]));
    assert_eq!(stage.plc.requests(), asked, "the key was looked up again");
    assert_eq!(stage.verified("valid").await, 1.0);
}

/// The relay sends no handles: the document claims one, and the handle confirms it.
#[tokio::test(flavor = "multi_thread")]
async fn handles_are_looked_up_and_shown_when_they_are_confirmed() {
    let plc = Plc::start().await;
    let mut accounts: Vec<Signed> = (0..4).map(Signed::new).collect();
    let mut frames = Frames::default();
    for (account, handle) in accounts.iter_mut().zip(["zero.test", "one.test", "two.test", "three.test"]) {
        account.handle = Some(handle.to_owned());
        plc.publish(account);
        frames.commit(account, &[write("hello")]);
    }
    plc.confirm("zero.test", &accounts[0].did);
    // Somebody else's.
    plc.confirm("one.test", &accounts[0].did);
    plc.confirm("three.test", &accounts[3].did);
    frames.push(|seq, _| identity(seq, &accounts[3].did, None));
    let mut stage = Stage::start(plc, frames.0, &[NO_REPAIRS]).await;
    stage.send(4).await;
    let shown = async || {
        let rows = query_rows(
            &stage.chain.database,
            "SELECT did, handle FROM users WHERE handle <> 'handle.invalid'",
        )
        .await;
        let pair = |row: Vec<Option<String>>| (row[0].clone().unwrap(), row[1].clone().unwrap());
        rows.into_iter().map(pair).collect::<BTreeMap<String, String>>()
    };
    let wait_for_handles = async |expected: BTreeMap<String, String>| {
        wait_for("the handles to be shown", RUN, async || {
            let left: u64 = redis_command(&stage.chain.redis, &["HLEN", "firehose:events:handles"]).await;
            let shown = shown().await;
            if shown == expected && left == 0 { Ok(()) } else { Err(format!("{left} left, {shown:?}")) }
        })
        .await;
    };
    let zero = (accounts[0].did.clone(), "zero.test".to_owned());
    let did = accounts[3].did.clone();
    let three = |handle: &str| (did.clone(), handle.to_owned());
    wait_for_handles(BTreeMap::from([zero.clone(), three("three.test")])).await;
    let count = async |result: &str| {
        stage.program.metric_with("standpipe_handle_lookups_total", &format!("\"{result}\"")).await
    };
    assert_eq!((count("confirmed").await, count("unconfirmed").await), (2.0, 2.0));
    // An account changes its handle, and the relay says no more than that something changed.
    accounts[3].handle = Some("drei.test".to_owned());
    stage.plc.publish(&accounts[3]);
    stage.plc.confirm("drei.test", &accounts[3].did);
    stage.allow(1);
    wait_for_handles(BTreeMap::from([zero, three("drei.test")])).await;
}

/// A commit whose verification makes the program panic costs nothing but itself.
#[tokio::test(flavor = "multi_thread")]
async fn a_panic_in_the_verification_costs_only_its_commit() {
    let plc = Plc::start().await;
    let (mut good, mut bad) = (Signed::new(1), Signed::new(2));
    let mut frames = Frames::default();
    frames.commit(&mut bad, &[write("bad")]);
    frames.commit(&mut good, &[write("good")]);
    plc.publish(&good);
    let panic = ("STANDPIPE_PANIC_OVER", format!("verify:{}", bad.did));
    let mut stage = Stage::start(plc, frames.0, &[NO_REPAIRS, (panic.0, &panic.1)]).await;
    stage.send(2).await;
    assert_eq!(stage.texts().await, ["good"]);
    assert_eq!(stage.repairs().await, BTreeMap::from([(bad.did, "commit".to_owned())]));
}
