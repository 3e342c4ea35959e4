//! The demonstration: what it shows while a server is killed, and how it ends.

use std::time::Duration;

use standpipe_lab::servers::Signal;
use standpipe_lab::wait::wait_for;

use crate::{NOTHING, RUN, start};

/// The number behind these words.
fn number(line: &str, words: &str) -> Option<u64> {
    line.split_once(words)?.1.split_whitespace().next()?.parse().ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn killing_redis_is_not_reported_as_loss_and_ctrl_c_runs_the_audit() {
    let mut demo = start(&["demo", "--rate", "500", "--accounts", "300"], NOTHING);
    let line = demo.wait_for_line("to break it: kill -9", RUN).await;
    let redis = number(&line, "its PostgreSQL, kill -9 ").unwrap().to_string();
    wait_for("events to arrive", RUN, async || {
        let output = demo.stdout();
        let arrived = output.lines().rev().find_map(|line| number(line, "in PostgreSQL "));
        if arrived > Some(1_000) { Ok(()) } else { Err(output) }
    })
    .await;
    let killed = std::process::Command::new("kill").args(["-9", &redis]).status().unwrap();
    assert!(killed.success());
    demo.wait_for_line("the private Redis has ended", RUN).await;
    // It works on, and what the relay sends again does not look like events that are missing.
    let before = demo.stdout().lines().count();
    wait_for("the pipelines to be at the relay's heels", RUN, async || {
        let output = demo.stdout();
        let near = output.lines().skip(before).any(|line| {
            let (sent, arrived) = (number(line, "relay sent "), number(line, "in PostgreSQL "));
            matches!((sent, arrived), (Some(sent), Some(arrived)) if sent > 1_500 && sent - arrived < 1_500)
        });
        if near { Ok(()) } else { Err(output) }
    })
    .await;
    demo.signal(Signal::Int);
    assert_eq!(demo.wait_exit(RUN).await, 0, "{}", demo.output());
    let output = demo.output();
    assert!(output.contains("\naudit") && output.contains("\neverything agrees\n"), "{output}");
    assert!(!output.contains("panicked"), "{output}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_demo_stopped_before_the_last_event_fails() {
    let mut demo = start(&["demo", "--events", "30000", "--rate", "500"], NOTHING);
    demo.wait_for_line("relay sent", RUN).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    demo.signal(Signal::Int);
    assert_eq!(demo.wait_exit(RUN).await, 1, "{}", demo.output());
    let output = demo.output();
    assert!(output.contains("stopped before all events had arrived"), "{output}");
    assert!(output.contains("\neverything agrees\n"), "{output}");
}
