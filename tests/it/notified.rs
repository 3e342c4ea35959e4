//! Nobody is notified of what was old when it arrived, whether it came live, with a repair or with a backfill.

use std::time::{SystemTime, UNIX_EPOCH};

use shrike::cbor::Value;

use crate::support::chain::RUN;
use crate::support::scripted::{Op, create};
use crate::support::signed::{Plc, Signed};
use crate::support::stage::{Frames, Stage, write};
use crate::support::{Standpipe, query_rows, query_value};

const DAY: u64 = 24 * 3600;

/// A moment so many seconds ago, as a TID and as a date.
fn ago(seconds: u64) -> (String, String) {
    const ALPHABET: &[u8; 32] = b"234567abcdefghijklmnopqrstuvwxyz";
    let micros =
        SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_micros() as u64 - seconds * 1_000_000;
    let bits = micros << 10;
    let tid = (0..13).rev().map(|digit| char::from(ALPHABET[(bits >> (5 * digit) & 31) as usize])).collect();
    (tid, jiff::Timestamp::from_microsecond(i64::try_from(micros).unwrap()).unwrap().to_string())
}

fn record(collection: &'static str, key: &str, date: &str, subject: &Value<'_>) -> Op {
    let record = Value::Map(vec![
        ("$type", Value::Text(collection)),
        ("subject", subject.clone()),
        ("createdAt", Value::Text(date)),
    ]);
    create(&format!("{collection}/{key}"), &record)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_old_when_it_arrived_notifies_nobody() {
    let (month_ago, now) = (ago(30 * DAY), ago(60));
    let week_ago = (ago(7 * DAY + 60), ago(7 * DAY - 3600));
    let whom = "did:plc:bbbbbbbbbbbbbbbbbbbbbbbb";
    let post = format!("at://{whom}/app.bsky.feed.post/1");
    let subject = Value::Map(vec![
        ("cid", Value::Text("bafyreidxkskkoafhrzsxtjwapsmnaqft7ntyoepjexjyw4zivcyej7qo3i")),
        ("uri", Value::Text(&post)),
    ]);
    // Its key and its own date are of this time; or it is just made and says that it is old.
    let like = |(key, date): &(String, String)| record("app.bsky.feed.like", key, date, &subject);
    let repost = |(key, date): &(String, String)| record("app.bsky.feed.repost", key, date, &subject);
    let follow =
        |(key, date): &(String, String)| record("app.bsky.graph.follow", key, date, &Value::Text(whom));
    let everything = || {
        vec![
            follow(&now),
            repost(&month_ago),
            like(&(now.0.clone(), month_ago.1.clone())),
            like(&(month_ago.0.clone(), now.1.clone())),
            like(&week_ago.0),
            like(&week_ago.1),
        ]
    };
    for transaction in ["event", "batch"] {
        let plc = Plc::start().await;
        let (mut live, mut fetched) = (Signed::new(1), Signed::new(2));
        let mut frames = Frames::default();
        frames.commit(&mut fetched, &[write("first")]);
        frames.push(|seq, _| live.commit(seq, &ago(1).0, &everything()));
        fetched.commit(0, &ago(2).0, &everything());
        frames.push(|seq, _| fetched.commit(seq, &ago(1).0, &[write("reveals")]));
        let mut filled = Signed::new(3);
        filled.commit(0, &ago(2).0, &everything());
        for account in [&live, &fetched, &filled] {
            plc.publish(account);
            plc.serve(account);
        }
        let settings = [("TRANSACTION", transaction), ("NOTIFY_WITHIN", "7d")];
        let mut stage = Stage::start(plc, frames.0, &settings).await;
        stage.send(1).await;
        stage.all_checked().await;
        stage.send(2).await;
        stage.repo_is(&fetched.did, "synced").await;
        // As a backfill does: not through the stream.
        let backfill =
            "INSERT INTO standpipe.repos (did, state, class, reason) VALUES ($$%$$, 'queued', 2, 'backfill')
                        RETURNING did";
        query_rows(&stage.chain.database, &backfill.replace('%', &filled.did)).await;
        stage.repo_is(&filled.did, "synced").await;
        let wanted: Vec<String> = [&live, &fetched, &filled]
            .iter()
            .flat_map(|account| {
                [("like", &week_ago.1.0), ("follow", &now.0)].map(|(kind, key)| (account, kind, key))
            })
            .map(|(account, kind, key)| {
                let room = if kind == "like" { "feed" } else { "graph" };
                format!("at://{}/app.bsky.{room}.{kind}/{key}#notification", account.did)
            })
            .collect();
        let found =
            query_rows(&stage.chain.database, "SELECT uri FROM notifications ORDER BY author_did, uri").await;
        let found: Vec<String> = found.into_iter().map(|mut row| row.remove(0).unwrap()).collect();
        assert_eq!(found, wanted, "{transaction}");
        let likes = "SELECT count(*) FROM likes";
        assert_eq!(query_value(&stage.chain.database, likes).await, "12");

        // The audit judges by the same rule, and what it writes is the same.
        let audit = async |arguments: &[&str], within: &str| {
            let variables = stage.variables.clone().with("NOTIFY_WITHIN", within);
            Standpipe::run(&[&["audit"], arguments].concat(), &variables, RUN).await
        };
        let clean = audit(&[], "7d").await;
        assert_eq!(clean.code, 0, "{transaction}: {}{}", clean.stdout, clean.stderr);
        assert_ne!(audit(&[], "off").await.code, 0, "{transaction}: the audit missed old ones");
        let before = "SELECT string_agg(uri || created_at, ' ' ORDER BY uri) FROM notifications";
        let notified = query_value(&stage.chain.database, before).await;
        query_rows(&stage.chain.database, "DELETE FROM notifications RETURNING uri").await;
        let repaired = audit(&["--repair"], "7d").await;
        assert_eq!(repaired.code, 0, "{transaction}: {}{}", repaired.stdout, repaired.stderr);
        assert_eq!(query_value(&stage.chain.database, before).await, notified, "{transaction}");
    }
}
