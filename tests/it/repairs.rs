//! Repairs: what was lost or forged upstream is fetched from the account's server, whatever arrives meanwhile, and whatever
//! the server answers.

use std::collections::BTreeMap;
use std::time::Instant;

use crate::support::chain::{Program, RUN, SOON};
use crate::support::scripted::{self, Op, create, delete, post, renumbered, rev};
use crate::support::signed::{Answer, Plc, Signed};
use crate::support::stage::{Frames, Stage, path, write};
use crate::support::{Postgres, Signal, Standpipe, execute, query_rows, query_value, wait_until};
use shrike::cbor::Value;
use standpipe::crash::Point;
use standpipe_lab::bench::machine;

fn like(key: &str, subject: &str) -> Op {
    let subject = Value::Map(vec![
        ("cid", Value::Text("bafyreidxkskkoafhrzsxtjwapsmnaqft7ntyoepjexjyw4zivcyej7qo3i")),
        ("uri", Value::Text(subject)),
    ]);
    let record = Value::Map(vec![
        ("$type", Value::Text("app.bsky.feed.like")),
        ("subject", subject),
        ("createdAt", Value::Text("2026-11-21T04:17:51.287Z")),
    ]);
    create(&format!("app.bsky.feed.like/{key}"), &record)
}

async fn audited(stage: &Stage) {
    let ended = Standpipe::run(&["audit"], &stage.variables, RUN).await;
    assert_eq!(ended.code, 0, "{}{}", ended.stdout, ended.stderr);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_lost_upstream_is_fetched_and_arriving_late_changes_nothing() {
    let plc = Plc::start().await;
    let mut account = Signed::new(1);
    let mut frames = Frames::default();
    let subject = "at://did:plc:bbbbbbbbbbbbbbbbbbbbbbbb/app.bsky.feed.post/1";
    frames.commit(&mut account, &[write("stays"), write("goes"), like("goes", subject), write("changes")]);
    // Lost: a delete, an update, creates, and a create that is deleted again.
    let mut lost = Vec::new();
    let changed = create(&path("changes"), &post("changed"));
    lost.push(account.commit(10, &rev(10), &[delete(&path("goes")), delete("app.bsky.feed.like/goes")]));
    lost.push(account.commit(11, &rev(11), &[Op { action: "update", ..changed }]));
    lost.push(account.commit(12, &rev(12), &[write("lost"), like("lost", subject), write("short")]));
    lost.push(account.commit(13, &rev(13), &[delete(&path("short"))]));
    frames.push(|seq, _| account.commit(seq, &rev(20), &[write("reveals")]));
    // Now they arrive, in the wrong order.
    for frame in lost.into_iter().rev() {
        frames.push(|_, _| frame);
    }
    plc.publish(&account);
    plc.serve(&account);
    let mut stage = Stage::start(plc, renumbered_all(&frames.0), &[]).await;
    stage.send(1).await;
    stage.all_checked().await;
    assert_eq!(stage.texts().await, ["changes", "goes", "stays"]);
    stage.send(1).await;
    stage.repo_is(&account.did, "synced").await;
    assert_eq!(stage.texts().await, ["changed", "lost", "reveals", "stays"]);
    let numbers = "SELECT healed || ' ' || deleted || ' ' || records FROM standpipe.repos";
    assert_eq!(query_value(&stage.chain.database, numbers).await, "3 2 5");
    stage.send(4).await;
    assert_eq!(stage.texts().await, ["changed", "lost", "reveals", "stays"]);
    assert_eq!(
        query_value(&stage.chain.database, "SELECT string_agg(uri, ' ') FROM likes").await,
        format!("at://{}/app.bsky.feed.like/lost", account.did)
    );
    audited(&stage).await;
}

/// While the account is not active, its server shows nothing; when it is again, the repair is made up for.
#[tokio::test(flavor = "multi_thread")]
async fn what_could_not_be_fetched_is_when_the_account_is_active_again() {
    for transaction in ["event", "batch"] {
        let plc = Plc::start().await;
        let mut account = Signed::new(1);
        let mut frames = Frames::default();
        frames.commit(&mut account, &[write("first")]);
        account.commit(10, &rev(10), &[write("lost")]);
        frames.push(|seq, _| account.commit(seq, &rev(20), &[write("reveals")]));
        frames.push(|seq, _| scripted::account(seq, &account.did, Some("deactivated")));
        frames.push(|seq, _| scripted::account(seq, &account.did, None));
        plc.publish(&account);
        plc.answer(&account.did, Answer::error(400, "RepoDeactivated"));
        let mut stage = Stage::start(plc, frames.0, &[("TRANSACTION", transaction)]).await;
        stage.send(1).await;
        stage.all_checked().await;
        stage.send(2).await;
        stage.repo_is(&account.did, "gone").await;
        stage.plc.serve(&account);
        stage.send(1).await;
        // Half a minute is too long to wait for it.
        let sooner = "UPDATE standpipe.repos SET retry_at = now() WHERE state = 'queued' RETURNING did";
        assert_eq!(query_rows(&stage.chain.database, sooner).await.len(), 1, "{transaction}");
        stage.repo_is(&account.did, "synced").await;
        assert_eq!(stage.texts().await, ["first", "lost", "reveals"], "{transaction}");
    }
}

/// Its server shows the repository, then the account is deleted, then the repair writes: nothing comes back.
#[tokio::test(flavor = "multi_thread")]
async fn a_repair_that_began_before_a_deletion_brings_nothing_back() {
    for (class, transaction) in [(0, "event"), (0, "batch"), (2, "event")] {
        let plc = Plc::start().await;
        let mut account = Signed::new(1);
        let mut frames = Frames::default();
        frames.commit(&mut account, &[write("first")]);
        account.commit(10, &rev(10), &[write("lost")]);
        frames.push(|seq, _| account.commit(seq, &rev(20), &[write("second")]));
        frames.push(|seq, _| scripted::account(seq, &account.did, Some("deleted")));
        plc.publish(&account);
        plc.serve(&account);
        plc.hold(true);
        let settings = [("TRANSACTION", transaction)];
        let mut stage = Stage::start(plc, frames.0, &settings).await;
        stage.send(1).await;
        stage.all_checked().await;
        if class == 2 {
            // A backfill writes by itself.
            let backfill = format!(
                "INSERT INTO standpipe.repos (did, state, class, reason) VALUES ('{}', 'queued', 2, 'backfill')",
                account.did
            );
            execute(&stage.chain.database, &backfill).await;
        } else {
            stage.send(1).await;
        }
        wait_until("the repository to be fetched", RUN, async || stage.plc.fetches() == 1).await;
        stage.send(if class == 2 { 2 } else { 1 }).await;
        let rows = "SELECT count(*) FROM posts";
        wait_until("the account to be purged", RUN, async || {
            query_value(&stage.chain.database, rows).await == "0"
        })
        .await;
        stage.plc.hold(false);
        // The commit asked for another repair, by which time there is nothing to repair.
        let again = "SELECT FROM standpipe.repos WHERE state = 'synced' OR retry_at > now()";
        wait_until("the first repair to be over", RUN, async || {
            !query_rows(&stage.chain.database, again).await.is_empty()
        })
        .await;
        execute(&stage.chain.database, "UPDATE standpipe.repos SET retry_at = now() WHERE state = 'queued'")
            .await;
        stage.repo_is(&account.did, if class == 2 { "gone" } else { "synced" }).await;
        assert_eq!(query_value(&stage.chain.database, rows).await, "0", "{class} {transaction}");
        audited(&stage).await;
    }
}

/// One repository that makes the program panic costs the others nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_repair_that_panics_is_reported_and_harms_no_other() {
    let plc = Plc::start().await;
    let mut accounts = [Signed::new(1), Signed::new(2)];
    let mut frames = Frames::default();
    for account in &mut accounts {
        frames.commit(account, &[write("first")]);
        account.commit(10, &rev(10), &[write("lost")]);
        frames.push(|seq, _| account.commit(seq, &rev(20), &[write("reveals")]));
        plc.publish(account);
        plc.serve(account);
    }
    let panics = format!("repair:{}", accounts[0].did);
    let mut stage = Stage::start(plc, frames.0, &[("STANDPIPE_PANIC_OVER", &panics)]).await;
    stage.send(1).await;
    stage.all_checked().await;
    stage.send(3).await;
    stage.repo_is(&accounts[1].did, "synced").await;
    let sql =
        format!("SELECT message FROM standpipe.repos WHERE did = '{}' AND attempts = 1", accounts[0].did);
    wait_until("the panic to be noted", RUN, async || {
        query_rows(&stage.chain.database, &sql)
            .await
            .first()
            .is_some_and(|row| row[0].as_deref() == Some("it made the program panic: see the log"))
    })
    .await;
    assert!(stage.program.is_running());
    assert!(stage.program.output().contains("a repair made the program panic"));
}

/// A repository whose two branches take turns, and `#sync` after `#sync`: each shows something new to repair, and the server
/// is asked every 30 seconds at most. Others notice nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_fork_and_a_flood_of_syncs_cost_few_fetches() {
    let plc = Plc::start().await;
    let (mut one, mut other) = (Signed::new(1), Signed::new(2));
    let mut frames = Frames::default();
    frames.commit(&mut one, &[write("common")]);
    frames.commit(&mut other, &[write("other")]);
    let mut branch = one.clone();
    for number in 0..200 {
        frames.commit(&mut one, &[write(&format!("one-{number}"))]);
        frames.commit(&mut branch, &[write(&format!("two-{number}"))]);
    }
    for _ in 0..1500 {
        frames.push(|seq, rev| one.sync(seq, rev));
        frames.push(|seq, rev| branch.sync(seq, rev));
    }
    frames.commit(&mut other, &[write("after")]);
    for account in [&one, &other] {
        plc.publish(account);
        plc.serve(account);
    }
    let count = frames.0.len();
    let mut stage = Stage::start(plc, frames.0, &[]).await;
    stage.send(2).await;
    stage.all_checked().await;
    let began = Instant::now();
    stage.send(count - 2).await;
    wait_until("the account to be fetched", RUN, async || stage.plc.fetches() > 0).await;
    let after = "SELECT count(*) FROM posts WHERE text = 'after'";
    assert_eq!(query_value(&stage.chain.database, after).await, "1");
    let pauses = began.elapsed().as_secs() / 30;
    assert!(stage.plc.fetches() <= 1 + pauses, "{} fetches after {pauses} pauses", stage.plc.fetches());
    let queue = "SELECT count(*) || ' ' || max(requests) FROM standpipe.repos";
    println!(
        "{} frames, {} fetches, queue {}",
        count,
        stage.plc.fetches(),
        query_value(&stage.chain.database, queue).await
    );
    let peak = machine::peak_memory(stage.program.pid()).unwrap();
    assert!(peak < 96 << 20, "{} MiB", peak >> 20);
}

/// The same frames with the numbers 1, 2, ... in their bodies too.
fn renumbered_all(frames: &[(i64, Vec<u8>)]) -> Vec<(i64, Vec<u8>)> {
    frames.iter().map(|(seq, frame)| (*seq, renumbered(frame, *seq))).collect()
}

/// The delete was lost, and the create that it belongs to is still in a worker's hands: without a mark of the repair, it
/// would come back for good.
#[tokio::test(flavor = "multi_thread")]
async fn a_create_in_flight_whose_delete_was_lost_does_not_come_back() {
    for transaction in ["event", "batch"] {
        let plc = Plc::start().await;
        let mut account = Signed::new(2);
        let mut frames = Frames::default();
        frames.commit(&mut account, &[write("first")]);
        // In flight: it never arrives before the repair.
        let late = account.commit(
            10,
            &rev(10),
            &[write("ghost"), like("ghost", "at://did:plc:x/app.bsky.feed.post/1")],
        );
        account.commit(0, &rev(11), &[delete(&path("ghost")), delete("app.bsky.feed.like/ghost")]);
        frames.push(|seq, _| account.commit(seq, &rev(20), &[write("second")]));
        frames.push(|_, _| late);
        // With others, so that they share a transaction.
        let mut others: Vec<Signed> = (10..60).map(Signed::new).collect();
        for other in &mut others {
            frames.commit(other, &[write("other")]);
            plc.publish(other);
        }
        plc.publish(&account);
        plc.serve(&account);
        let mut stage = Stage::start(
            plc,
            renumbered_all(&frames.0),
            &[("TRANSACTION", transaction), ("PARALLEL_CONSUMERS", "1")],
        )
        .await;
        stage.send(2).await;
        stage.repo_is(&account.did, "synced").await;
        stage.send(51).await;
        let own = format!("SELECT count(*) FROM posts WHERE author_did = '{}'", account.did);
        assert_eq!(query_value(&stage.chain.database, &own).await, "2", "{transaction}");
        assert_eq!(
            query_value(&stage.chain.database, "SELECT count(*) FROM likes").await,
            "0",
            "{transaction}"
        );
        assert_eq!(query_value(&stage.chain.database, "SELECT count(*) FROM posts").await, "52");
        audited(&stage).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forged_commit_ends_with_what_the_account_has() {
    let plc = Plc::start().await;
    let mut account = Signed::new(4);
    plc.publish(&account);
    let mut frames = Frames::default();
    frames.commit(&mut account, &[write("one")]);
    // Its revision, which nobody has signed, must not be what the repair waits for.
    frames.push(|seq, _| {
        let mut forged = account.clone();
        forged.rotate(77);
        forged.commit(seq, &rev(1_000_000), &[write("forged")])
    });
    account.commit(0, &rev(2), &[write("real")]);
    plc.serve(&account);
    let mut stage = Stage::start(plc, frames.0, &[]).await;
    stage.send(1).await;
    stage.all_checked().await;
    stage.send(1).await;
    stage.repo_is(&account.did, "synced").await;
    assert_eq!(stage.texts().await, ["one", "real"]);
    audited(&stage).await;
}

/// Whatever the server answers, nothing is deleted, and the queue says why.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_lies_or_refuses_deletes_nothing() {
    let plc = Plc::start().await;
    let mut frames = Frames::default();
    let mut accounts: Vec<Signed> = (0..9).map(Signed::new).collect();
    for account in &mut accounts {
        frames.commit(account, &[write("a"), write("b"), write("c")]);
        plc.publish(account);
    }
    let before: Vec<Signed> = accounts.clone();
    for account in &mut accounts {
        account.commit(0, &rev(100), &[write("lost")]);
        frames.push(|seq, _| account.commit(seq, &rev(200), &[write("d")]));
    }
    let whole = accounts[0].repository();
    let other = accounts[1].repository();
    let mut foreign = accounts[4].clone();
    foreign.rotate(66);
    let mut half = accounts[6].repository();
    half.truncate(half.len() - 40);
    let answers = [
        (Answer { retry_after: Some(600), ..Answer::error(429, "RateLimitExceeded") }, "429"),
        (Answer::ok(whole[..whole.len() / 2].to_vec()), "archive"),
        (Answer::ok(other), "is that of"),
        (Answer::ok(before[3].repository()), "older than"),
        (Answer::ok(foreign.repository()), "signature"),
        (Answer::ok(Vec::new()), "archive"),
        (Answer::ok(half), "archive"),
        (Answer::error(500, "InternalServerError"), "500"),
        (Answer::error(400, "RepoTakendown"), "RepoTakendown"),
    ];
    // The one that asks us to wait comes last: the others are on the same host.
    for (account, (answer, _)) in accounts.iter().zip(&answers).skip(1) {
        plc.answer(&account.did, answer.clone());
    }
    plc.answer(&accounts[0].did, Answer::ok(Vec::new()));
    let mut stage = Stage::start(plc, frames.0, &[]).await;
    stage.send(9).await;
    stage.all_checked().await;
    stage.send(9).await;
    let texts = stage.texts().await;
    assert_eq!(texts.len(), 9 * 4);
    let says = async |did: &str, what: &str| {
        let sql =
            format!("SELECT state || ': ' || coalesce(message, '') FROM standpipe.repos WHERE did = '{did}'");
        wait_until(&format!("{did} to be about {what}"), RUN, async || {
            query_rows(&stage.chain.database, &sql)
                .await
                .first()
                .is_some_and(|row| row[0].as_ref().unwrap().contains(what))
        })
        .await;
    };
    for (account, (_, what)) in accounts.iter().zip(&answers).skip(1) {
        says(&account.did, what).await;
    }
    stage.repo_is(&accounts[8].did, "gone").await;
    // A server that is behind is not asked again at once, however new the revisions are that its account announces.
    let pause = format!(
        "SELECT min(retry_at - updated_at) >= interval '30 seconds' FROM standpipe.repos WHERE did = '{}'",
        accounts[3].did
    );
    assert_eq!(query_value(&stage.chain.database, &pause).await, "t");
    // From now on, the host is left alone.
    stage.plc.answer(&accounts[0].did, answers[0].0.clone());
    says(&accounts[0].did, "429").await;
    let asked = stage.plc.fetches();
    wait_until("the others to hear of it", RUN, async || {
        query_rows(
            &stage.chain.database,
            "SELECT FROM standpipe.repos WHERE message LIKE '%asks us to wait%'",
        )
        .await
        .len()
            >= 2
    })
    .await;
    assert_eq!(stage.plc.fetches(), asked, "the host was asked before its Retry-After");
    assert_eq!(stage.texts().await, texts);
    stage.program.metric_with_is("standpipe_repairs_total", "gone", 1.0).await;
}

/// A repository that would delete most of an account's rows is believed at the second look.
#[tokio::test(flavor = "multi_thread")]
async fn a_large_share_of_deletes_needs_a_second_look() {
    let plc = Plc::start().await;
    let mut account = Signed::new(5);
    plc.publish(&account);
    let mut frames = Frames::default();
    let many: Vec<Op> = (0..50).map(|n| write(&format!("{n:02}"))).collect();
    frames.commit(&mut account, &many);
    let gone: Vec<Op> = (0..50).map(|n| delete(&path(&format!("{n:02}")))).collect();
    account.commit(0, &rev(10), &gone);
    frames.push(|seq, _| account.commit(seq, &rev(20), &[write("new")]));
    plc.serve(&account);
    let mut stage = Stage::start(plc, frames.0, &[]).await;
    stage.send(2).await;
    stage.repo_is(&account.did, "synced").await;
    assert_eq!(stage.texts().await, ["new"]);
    assert_eq!(stage.plc.fetches(), 2);
    stage.program.metric_with_is("standpipe_repairs_total", "postponed", 1.0).await;
}

/// The process dies at each step of a repair; the next one finishes it.
#[tokio::test(flavor = "multi_thread")]
#[cfg_attr(not(debug_assertions), ignore = "a release build has no crash points")]
async fn a_repair_that_was_cut_off_is_done_again() {
    for point in [Point::AfterFetch, Point::AfterComplete, Point::AfterRepair].map(Point::name) {
        let plc = Plc::start().await;
        let mut account = Signed::new(6);
        plc.publish(&account);
        let mut frames = Frames::default();
        frames.commit(&mut account, &[write("one"), write("gone")]);
        account.commit(0, &rev(10), &[write("lost"), delete(&path("gone"))]);
        frames.push(|seq, _| account.commit(seq, &rev(20), &[write("two")]));
        plc.serve(&account);
        let mut stage = Stage::start(plc, frames.0, &[("STANDPIPE_CRASH_AT", point)]).await;
        stage.send(1).await;
        stage.all_checked().await;
        // Whether the second frame is applied before the crash does not matter.
        stage.allow(1);
        assert_ne!(stage.program.wait_exit(SOON).await, 0, "{point}");
        assert!(stage.program.stderr().contains(&format!("crash point {point} reached")), "{point}");
        stage.program = Program::start("run", &stage.variables.clone().with("STANDPIPE_CRASH_AT", "")).await;
        stage.repo_is(&account.did, "synced").await;
        assert_eq!(stage.texts().await, ["lost", "one", "two"], "{point}");
        stage.program.signal(Signal::Term);
        assert_eq!(stage.program.wait_exit(SOON).await, 0);
        audited(&stage).await;
    }
}

/// A forked repository: each commit contradicts the one before it. It is fetched once, and then left alone for 30 seconds.
#[tokio::test(flavor = "multi_thread")]
async fn an_account_that_keeps_contradicting_itself_is_left_alone_for_a_while() {
    let plc = Plc::start().await;
    let (mut one, mut other) = (Signed::new(7), Signed::new(7));
    plc.publish(&one);
    let mut frames = Frames::default();
    for n in 0..40 {
        frames.commit(&mut one, &[write(&format!("one{n}"))]);
        frames.commit(&mut other, &[write(&format!("other{n}"))]);
    }
    plc.serve(&other);
    let mut stage = Stage::start(plc, frames.0, &[]).await;
    stage.send(2).await;
    stage.repo_is(&one.did, "queued").await;
    // The server has the last of them from the beginning, so the first repair succeeds.
    stage.repo_is(&one.did, "synced").await;
    stage.send(78).await;
    stage.repo_is(&one.did, "queued").await;
    let later = "SELECT retry_at > now() + interval '5 seconds' FROM standpipe.repos";
    assert_eq!(query_value(&stage.chain.database, later).await, "t");
    assert_eq!(stage.plc.fetches(), 1);
    execute(&stage.chain.database, "UPDATE standpipe.repos SET retry_at = now()").await;
    stage.repo_is(&one.did, "synced").await;
    assert_eq!(stage.plc.fetches(), 2);
    let reasons: BTreeMap<String, String> = stage.repairs().await;
    assert_eq!(reasons[&one.did], "chain");
}

/// An operator looks at the queue, and adds to it.
#[tokio::test(flavor = "multi_thread")]
async fn an_operator_can_queue_a_repository_and_see_what_came_of_it() {
    let plc = Plc::start().await;
    let (mut known, mut unknown) = (Signed::new(8), Signed::new(9));
    let mut frames = Frames::default();
    frames.commit(&mut known, &[write("one")]);
    unknown.commit(0, &rev(5), &[write("unseen")]);
    for account in [&known, &unknown] {
        plc.publish(account);
        plc.serve(account);
    }
    let mut stage = Stage::start(plc, frames.0, &[]).await;
    stage.send(1).await;
    let run = async |arguments: &[&str]| Standpipe::run(arguments, &stage.variables, SOON).await;
    let elsewhere = Postgres::shared().await.fresh_database().await;
    let early = Standpipe::run(&["repos", "list"], &[("DATABASE_URL", &elsewhere)], SOON).await;
    assert_eq!(early.code, 1);
    assert!(early.stderr.contains("run standpipe migrate"), "{}", early.stderr);
    let nothing = run(&["repos", "list"]).await;
    assert_eq!((nothing.code, nothing.stdout.trim()), (0, "no repository was ever to be repaired"));
    let bad = run(&["repos", "add", "alice.example"]).await;
    assert_eq!(bad.code, 64, "{}", bad.stderr);
    let none = Signed::new(10).did;
    let added = run(&["repos", "add", &known.did, &unknown.did, &none]).await;
    assert_eq!(added.code, 0, "{}", added.stderr);
    for (did, state) in [(&known.did, "synced"), (&unknown.did, "synced"), (&none, "gone")] {
        stage.repo_is(did, state).await;
    }
    assert_eq!(stage.texts().await, ["one", "unseen"]);
    let list = run(&["repos", "list"]).await.stdout;
    assert!(list.starts_with("1 gone, 2 synced\n"), "{list}");
    let line = list.lines().find(|line| line.starts_with(&unknown.did)).unwrap();
    assert_eq!(line.split_whitespace().collect::<Vec<_>>()[1..4], ["synced", "asked", "for"], "{list}");
    stage.program.metric_with_is("standpipe_repositories", "synced", 2.0).await;
    let http = stage.variables.clone().with("HTTP_ADDR", stage.program.http.to_string());
    let status = Standpipe::run(&["status"], &http, SOON).await.stdout;
    assert!(status.contains("2 synced, 1 gone"), "{status}");
    let verify = async |did: &str| run(&["repos", "verify", did]).await;
    let equal = verify(&unknown.did).await;
    assert_eq!(equal.code, 0, "{}", equal.stdout);
    assert!(equal.stdout.contains("equal, 1 records"), "{}", equal.stdout);
    let uri = format!("at://{}/app.bsky.feed.post/", known.did);
    execute(&stage.chain.database, &format!("UPDATE posts SET uri = '{uri}two' WHERE uri = '{uri}one'"))
        .await;
    let differs = verify(&known.did).await;
    assert_eq!(differs.code, 1, "{}", differs.stdout);
    for path in ["- app.bsky.feed.post/one", "+ app.bsky.feed.post/two"] {
        assert!(differs.stdout.contains(path), "{path}: {}", differs.stdout);
    }
    let cannot = verify(&none).await;
    assert!(cannot.code == 1 && cannot.stdout.contains("cannot be compared"), "{}", cannot.stdout);
    let unseen = Signed::new(11).did;
    let shown = run(&["repos", "show", &known.did, &unknown.did, &none, &unseen]).await.stdout;
    let state = |did: &str| {
        let line = shown.lines().find(|line| line.starts_with(did)).unwrap();
        line.split_whitespace().nth(1).unwrap().to_owned()
    };
    let states = [&known.did, &unknown.did, &none, &unseen].map(|did| state(did));
    assert_eq!(states, ["whole", "whole", "unseen", "unseen"], "{shown}");
    assert!(shown.contains(&rev(1)) && shown.contains(&rev(5)), "{shown}");
    let json = run(&["repos", "list", "--json", "--state", "gone"]).await.stdout;
    let gone: serde_json::Value = serde_json::from_str(json.trim()).unwrap();
    assert_eq!(gone["did"], none.as_str());
    assert!(gone["message"].as_str().unwrap().contains("does not know"), "{gone}");
}

/// A directory that is down is not the repositories' fault: none is given up, however long that lasts.
#[tokio::test(flavor = "multi_thread")]
async fn a_directory_that_is_down_uses_up_no_attempts() {
    let plc = Plc::start().await;
    let mut account = Signed::new(1);
    account.commit(0, &rev(1), &[write("one")]);
    plc.publish(&account);
    plc.serve(&account);
    plc.set_away(true);
    let stage = Stage::start(plc, Vec::new(), &[]).await;
    assert_eq!(Standpipe::run(&["migrate"], &stage.variables, RUN).await.code, 0);
    assert_eq!(Standpipe::run(&["repos", "add", &account.did], &stage.variables, SOON).await.code, 0);
    let database = &stage.chain.database;
    let sooner =
        "UPDATE standpipe.repos SET retry_at = now(), message = NULL WHERE state = 'queued' RETURNING did";
    for _ in 0..25 {
        wait_until("it to be tried", RUN, async || {
            query_value(database, "SELECT count(*) FROM standpipe.repos WHERE message IS NOT NULL").await
                == "1"
        })
        .await;
        assert_eq!(query_rows(database, sooner).await.len(), 1, "it was given up");
    }
    stage.plc.set_away(false);
    wait_until("it to be repaired", RUN, async || {
        execute(database, "UPDATE standpipe.repos SET retry_at = now() WHERE state = 'queued'").await;
        stage.texts().await == ["one"]
    })
    .await;
}

/// Many repositories on one host take turns; waiting for it is not a failure.
#[tokio::test(flavor = "multi_thread")]
async fn repositories_of_one_host_take_turns() {
    let plc = Plc::start().await;
    let mut accounts: Vec<Signed> = (0..30).map(Signed::new).collect();
    for account in &mut accounts {
        account.commit(0, &rev(1), &[write("one")]);
        plc.publish(account);
        plc.serve(account);
    }
    let stage = Stage::start(plc, Vec::new(), &[]).await;
    assert_eq!(Standpipe::run(&["migrate"], &stage.variables, RUN).await.code, 0);
    let mut arguments = vec!["repos", "add"];
    arguments.extend(accounts.iter().map(|account| account.did.as_str()));
    let added = Standpipe::run(&arguments, &stage.variables, SOON).await;
    assert_eq!(added.code, 0, "{}", added.stderr);
    for account in &accounts {
        stage.repo_is(&account.did, "synced").await;
    }
    assert_eq!(stage.texts().await.len(), 30);
    assert_eq!(stage.plc.fetches(), 30);
    let failed = stage.program.metric_with("standpipe_repairs_total", "postponed").await;
    assert_eq!(failed, 0.0, "{}", stage.program.stderr());
}
