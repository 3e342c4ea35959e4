//! What commands print: it may be left unread, and nothing from the network reaches a terminal unescaped.

use std::process::Stdio;

use crate::support::chain::{DEAD, RUN, SOON, Variables, redis_command};
use crate::support::{Postgres, Redis, Standpipe, free_port};
use serde_json::{Value, json};

/// Runs the program with closed output pipes; returns its standard error if that one is left open.
async fn unread(arguments: &[&str], variables: &Variables, stderr_too: bool) -> (i32, String) {
    let closed = || {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        Stdio::from(writer)
    };
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_standpipe"));
    command
        .args(arguments)
        .env_clear()
        .envs(std::env::var_os("PATH").map(|path| ("PATH", path)))
        .envs(variables.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null())
        .stdout(closed())
        .stderr(if stderr_too { closed() } else { Stdio::piped() })
        .kill_on_drop(true);
    let child = command.spawn().unwrap();
    // Our copies of its pipe ends must not stay open.
    drop(command);
    let ended = tokio::time::timeout(RUN, child.wait_with_output()).await;
    let ended = ended.unwrap_or_else(|_| panic!("{arguments:?} does not end")).unwrap();
    let code = ended.status.code().unwrap_or_else(|| panic!("{arguments:?}: {}", ended.status));
    (code, String::from_utf8(ended.stderr).unwrap())
}

/// Stores a dead letter, as a worker does.
async fn bury(redis: &Redis, path: &str, message: &str) -> String {
    let op =
        json!({"action": "create", "path": path, "cid": "bafy", "record": {"text": message}}).to_string();
    let data = json!({"repo": "did:plc:a", "rev": "3n2samfdihk2n"}).to_string();
    let now = "2026-11-21T12:00:00Z";
    let fields = [
        ("source_id", "1-1"),
        ("type", "commit"),
        ("seq", "7"),
        ("reason", "invalid_field"),
        ("message", message),
        ("op", &op),
        ("data", &data),
        ("attempts", "1"),
        ("first_time", now),
        ("last_time", now),
        ("version", "1"),
    ];
    let mut words = vec!["XADD", DEAD, "*"];
    words.extend(fields.iter().flat_map(|(name, value)| [*name, *value]));
    redis_command(redis, &words).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closed_output_pipe_ends_every_command_quietly() {
    let redis = Redis::start().await;
    let database = Postgres::shared().await.fresh_database().await;
    let id = bury(&redis, "app.bsky.feed.like/1", "no subject").await;
    let variables = Variables::new()
        .with("REDIS_URL", redis.url())
        .with("DATABASE_URL", &database)
        .with("HTTP_ADDR", format!("127.0.0.1:{}", free_port().unwrap()));
    for arguments in [
        &["--help"][..],
        &["--version"],
        &["help-env"],
        &["migrate", "--dry-run"],
        &["migrate"],
        &["audit"],
        &["status"],
        &["status", "--json"],
        &["status", "--watch", "1"],
        &["dead-letters", "list"],
        &["dead-letters", "list", "--json"],
        &["dead-letters", "show", &id],
        &["dead-letters", "show", &id, "--json"],
        &["dead-letters", "retry", &id],
        &["dead-letters", "purge", &id],
    ] {
        let (code, stderr) = unread(arguments, &variables, false).await;
        assert_eq!(code, 0, "{arguments:?}: {stderr}");
        assert!(!stderr.contains("panicked") && !stderr.contains("roken pipe"), "{arguments:?}: {stderr}");
    }
    // Where the exit code is the answer, it is unaffected.
    let away = variables.clone().with("REDIS_URL", format!("redis://127.0.0.1:{}", free_port().unwrap()));
    for (arguments, code) in
        [(&["check"][..], 69), (&["check", "--json"], 69), (&["status"], 69), (&["healthcheck"], 1)]
    {
        let (ended, stderr) = unread(arguments, &away, false).await;
        assert!(ended == code && !stderr.contains("panicked"), "{arguments:?}: {ended} {stderr}");
    }
    // Even error messages may go unread.
    for (arguments, code) in
        [(&["no-such-command"][..], 64), (&["dead-letters", "show", "9-9"], 1), (&["control", "drain"], 64)]
    {
        assert_eq!(unread(arguments, &variables, true).await.0, code, "{arguments:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_from_the_network_reaches_a_terminal_unescaped() {
    let redis = Redis::start().await;
    let hostile = "a\u{1b}]0;title\u{7}b\0c\u{9b}2Jd\u{202e}e\u{2066}f\r\ng";
    let path = format!("app.bsky.feed.post{hostile}/{}", "k".repeat(900_000));
    let id = bury(&redis, &path, &format!("{hostile}{}", "m".repeat(900_000))).await;
    let variables = Variables::new().with("REDIS_URL", redis.url()).with("HTTP_ADDR", "off");
    let letters = async |arguments: &[&str]| {
        let finished = Standpipe::run(&[&["dead-letters"], arguments].concat(), &variables, SOON).await;
        assert!(finished.code == 0 && finished.stderr.is_empty(), "{arguments:?}: {}", finished.stderr);
        let harmful = |c: char| c.is_control() && c != '\n' || matches!(c, '\u{202e}' | '\u{2066}');
        assert!(!finished.stdout.contains(harmful), "{arguments:?}: {:?}", finished.stdout);
        finished.stdout
    };
    let list = letters(&["list"]).await;
    assert_eq!(list.lines().count(), 1, "{list}");
    assert!(
        list.len() < 1_000 && list.contains("\\u{1b}]0;title\\u{7}b\\u{0}c\\u{9b}2Jd\\u{202e}e"),
        "{list}"
    );
    let page = letters(&["show", &id]).await;
    assert!(page.lines().all(|line| line.chars().count() < 5_000), "{page}");
    assert!(page.contains("record      at://did:plc:a/app.bsky.feed.posta\\u{1b}]0;title"), "{page}");

    // As JSON it is complete and unchanged.
    for arguments in [&["list", "--json"][..], &["show", &id, "--json"]] {
        let letter: Value = serde_json::from_str(&letters(arguments).await).unwrap();
        assert!(letter["message"].as_str().unwrap().starts_with(hostile), "{arguments:?}");
        let op: Value = serde_json::from_str(letter["op"].as_str().unwrap()).unwrap();
        assert_eq!(op["path"], path, "{arguments:?}");
    }
}
