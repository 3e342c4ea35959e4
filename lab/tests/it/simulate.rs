//! `standpipe-lab simulate`: a relay on the command line.

use std::io::Read as _;
use std::process::{Command, Stdio};

use futures_util::StreamExt as _;
use standpipe_lab::servers::{Signal, free_port};

use crate::{NOTHING, RUN, run, start};

#[tokio::test]
async fn it_serves_every_event_and_exits_on_sigterm() {
    let listen = format!("127.0.0.1:{}", free_port().unwrap());
    let mut relay = start(&["simulate", "--listen", &listen, "--events", "100", "--rate", "1000/s"], NOTHING);
    relay.wait_for_line(&listen, RUN).await;
    let url = format!("ws://{listen}/xrpc/com.atproto.sync.subscribeRepos?cursor=0");
    let (consumer, _) = tokio_tungstenite::connect_async(url).await.unwrap();
    assert_eq!(consumer.take(100).filter(|frame| std::future::ready(frame.is_ok())).count().await, 100);
    relay.signal(Signal::Term);
    assert_eq!(relay.wait_exit(RUN).await, 0);
}

#[tokio::test]
async fn a_missing_file_and_an_address_in_use_are_named_in_the_error() {
    let missing = run(&["simulate", "--frames", "/no/such/file"], NOTHING, RUN).await;
    assert!(missing.code == 1 && missing.stderr.contains("/no/such/file"), "{missing:?}");
    let taken = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let taken = run(&["simulate", "--listen", &address], NOTHING, RUN).await;
    assert!(taken.code == 1 && taken.stderr.contains(&address), "{taken:?}");
}

#[test]
fn a_closed_output_pipe_ends_it_quietly() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut child = Command::new(env!("CARGO_BIN_EXE_standpipe-lab"))
        .args(["simulate", "--listen", "127.0.0.1:0"])
        .stdout(writer)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stderr = String::new();
    child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
    assert!(child.wait().unwrap().success(), "{stderr}");
    assert_eq!(stderr, "");
}
