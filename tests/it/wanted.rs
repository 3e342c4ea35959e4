//! `WANTED_DIDS`: what belongs to other accounts is left out, and nothing of those that are wanted is missing.

use crate::support::chain::{CURSOR, Program, RUN, SOON, STREAM, redis_command};
use crate::support::scripted::rev;
use crate::support::signed::{Plc, Signed};
use crate::support::stage::{Frames, Stage, write};
use crate::support::{Signal, Standpipe, execute, query_value, wait_until};

const UNWANTED: &str = "standpipe_relay_unwanted_events_total";

fn hash() -> String {
    format!("{STREAM}:wanted")
}

async fn add(stage: &Stage, account: &Signed) {
    assert_eq!(Standpipe::run(&["migrate"], &stage.variables, RUN).await.code, 0);
    let added = Standpipe::run(&["repos", "add", &account.did], &stage.variables, SOON).await;
    assert_eq!(added.code, 0, "{}", added.stderr);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_accounts_on_the_list_are_kept() {
    for verify in ["on", "off"] {
        let plc = Plc::start().await;
        let mut accounts: Vec<Signed> = (0..3).map(Signed::new).collect();
        let mut frames = Frames::default();
        for round in 0..4 {
            for (number, account) in accounts.iter_mut().enumerate() {
                frames.commit(account, &[write(&format!("{number}-{round}"))]);
                plc.publish(account);
            }
        }
        let list = format!("{}, {}", accounts[0].did, accounts[2].did);
        let mut stage = Stage::start(plc, frames.0, &[("WANTED_DIDS", &list), ("VERIFY", verify)]).await;
        stage.send(12).await;
        let texts: Vec<String> =
            [0, 2].iter().flat_map(|number| (0..4).map(move |round| format!("{number}-{round}"))).collect();
        assert_eq!(stage.texts().await, texts, "VERIFY={verify}");
        stage.program.metric_is(UNWANTED, 4.0).await;
        let users = query_value(&stage.chain.database, "SELECT count(*) FROM users").await;
        assert_eq!(users, "2", "VERIFY={verify}");
    }
}

/// An account that is added has its whole repository, and everything that it writes from then on. What the relay loses between
/// the two shows at once.
#[tokio::test(flavor = "multi_thread")]
async fn tracked_accounts_are_whole_from_the_moment_they_are_added() {
    let plc = Plc::start().await;
    let (mut tracked, mut other) = (Signed::new(1), Signed::new(2));
    tracked.handle = Some("one.test".to_owned());
    let mut frames = Frames::default();
    frames.commit(&mut tracked, &[write("before")]);
    frames.commit(&mut other, &[write("other")]);
    let at_first = tracked.clone();
    let lost = tracked.commit(10, &rev(10), &[write("lost")]);
    frames.push(|seq, _| tracked.commit(seq, &rev(20), &[write("reveals")]));
    frames.push(|seq, _| other.commit(seq, &rev(21), &[write("other-again")]));
    for account in [&tracked, &other] {
        plc.publish(account);
    }
    plc.serve(&at_first);
    plc.confirm("one.test", &tracked.did);
    let mut stage = Stage::start(plc, frames.0, &[("WANTED_DIDS", "tracked")]).await;
    stage.send(2).await;
    stage.program.metric_is(UNWANTED, 2.0).await;
    assert_eq!(stage.texts().await, Vec::<String>::new());
    add(&stage, &tracked).await;
    stage.repo_is(&tracked.did, "synced").await;
    assert_eq!(stage.texts().await, ["before"]);

    drop(lost);
    stage.plc.serve(&tracked);
    stage.send(2).await;
    wait_until("what was lost to be repaired", RUN, async || {
        let sooner = "UPDATE standpipe.repos SET retry_at = now() WHERE state = 'queued'";
        execute(&stage.chain.database, sooner).await;
        stage.texts().await == ["before", "lost", "reveals"]
    })
    .await;
    stage.program.metric_is(UNWANTED, 3.0).await;
    let handle = format!("SELECT coalesce(handle, '') FROM users WHERE did = '{}'", tracked.did);
    wait_until("its handle to be looked up", RUN, async || {
        query_value(&stage.chain.database, &handle).await == "one.test"
    })
    .await;

    // What the tables name grows with every account.
    let seen = stage.variables.clone().with("BACKFILL", "seen");
    let refused = Standpipe::run(&["run"], &seen, SOON).await;
    assert_eq!(refused.code, 64, "{}", refused.stderr);
    assert!(refused.stderr.contains("WANTED_DIDS"), "{}", refused.stderr);
}

/// Redis may forget that an account is tracked: what was left out in the meantime is made up for.
#[tokio::test(flavor = "multi_thread")]
async fn an_account_that_redis_has_forgotten_is_repaired() {
    let plc = Plc::start().await;
    let mut account = Signed::new(1);
    let mut frames = Frames::default();
    frames.commit(&mut account, &[write("before")]);
    plc.publish(&account);
    plc.serve(&account);
    let stage = Stage::start(plc, Vec::new(), &[("WANTED_DIDS", "tracked")]).await;
    add(&stage, &account).await;
    stage.repo_is(&account.did, "synced").await;
    assert_eq!(stage.texts().await, ["before"]);
    account.commit(2, &rev(2), &[write("meanwhile")]);
    stage.plc.serve(&account);
    let gone: u64 = redis_command(&stage.chain.redis, &["HDEL", &hash(), &account.did]).await;
    assert_eq!(gone, 1);
    wait_until("the account to be repaired", RUN, async || {
        let sooner = "UPDATE standpipe.repos SET retry_at = now() WHERE state = 'queued'";
        execute(&stage.chain.database, sooner).await;
        stage.texts().await == ["before", "meanwhile"]
    })
    .await;
    let back: bool = redis_command(&stage.chain.redis, &["HEXISTS", &hash(), &account.did]).await;
    assert!(back);
}

/// While nobody knows which accounts are tracked, nothing is read, rather than everything left out.
#[tokio::test(flavor = "multi_thread")]
async fn a_reader_without_the_list_waits_for_a_worker() {
    let plc = Plc::start().await;
    let mut account = Signed::new(1);
    let mut frames = Frames::default();
    frames.commit(&mut account, &[write("one")]);
    frames.commit(&mut account, &[write("two")]);
    plc.publish(&account);
    plc.serve(&account);
    let mut stage = Stage::start(plc, frames.0, &[("WANTED_DIDS", "tracked")]).await;
    add(&stage, &account).await;
    stage.repo_is(&account.did, "synced").await;
    stage.send(1).await;
    stage.program.signal(Signal::Term);
    assert_eq!(stage.program.wait_exit(RUN).await, 0, "{}", stage.program.output());
    let gone: u64 = redis_command(&stage.chain.redis, &["DEL", &hash()]).await;
    assert_eq!(gone, 1);
    stage.allow(1);
    let mut reader = Program::start("reader", &stage.variables).await;
    reader.wait_for_line("no worker has listed the accounts of standpipe.repos", RUN).await;
    let (code, reasons) = reader.readiness().await;
    assert!(code == 503 && reasons.contains("WANTED_DIDS"), "{code} {reasons}");
    let cursor: String = redis_command(&stage.chain.redis, &["GET", CURSOR]).await;
    assert_eq!(cursor, "1");
    let _worker = Program::start("worker", &stage.variables).await;
    wait_until("the next commit to be applied", RUN, async || stage.texts().await == ["one", "two"]).await;
    assert!(reader.is_running());
}
