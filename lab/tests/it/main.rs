//! `standpipe-lab` as its users start it.

mod bench;
mod demo;
mod simulate;

use std::path::Path;
use std::time::Duration;

use standpipe_lab::program::{Finished, Program};

const NOTHING: &[(&str, &str)] = &[];
/// Far longer than anything takes: other tests run beside it.
const RUN: Duration = Duration::from_mins(6);

fn start(arguments: &[&str], variables: &[(&str, &str)]) -> Program {
    Program::start(Path::new(env!("CARGO_BIN_EXE_standpipe-lab")), arguments, variables)
}

async fn run(arguments: &[&str], variables: &[(&str, &str)], deadline: Duration) -> Finished {
    start(arguments, variables).finish(deadline).await
}

#[tokio::test]
async fn help_and_version_exit_0_and_usage_errors_exit_64() {
    for arguments in [
        &["--help"][..],
        &["--version"],
        &["help", "demo"],
        &["simulate", "--help"],
        &["demo", "--help"],
        &["bench", "--help"],
    ] {
        let finished = run(arguments, NOTHING, RUN).await;
        assert_eq!(finished.code, 0, "{arguments:?}: {finished:?}");
        assert!(!finished.stdout.is_empty() && finished.stderr.is_empty(), "{arguments:?}: {finished:?}");
    }
    for arguments in [
        &[][..],
        &["no-such-command"],
        &["simulate", "--events", "many"],
        &["simulate", "--rate", "0"],
        &["simulate", "--listen", "nowhere"],
        &["demo", "--seed"],
    ] {
        let finished = run(arguments, NOTHING, RUN).await;
        assert_eq!(finished.code, 64, "{arguments:?}: {finished:?}");
        assert!(!finished.stderr.is_empty(), "{arguments:?}");
    }
    let bad = run(&["demo"], &[("BATCH_SIZE", "many")], RUN).await;
    assert!(bad.code == 64 && bad.stderr.contains("BATCH_SIZE: "), "{bad:?}");
}
