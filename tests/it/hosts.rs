//! Servers that lie, hang, or send without end: nothing is deleted, the queue says why, and the repositories of other servers
//! are repaired at their pace.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::task::AbortOnDropHandle;

use crate::support::chain::RUN;
use crate::support::scripted::rev;
use crate::support::signed::{Answer, Plc, Signed};
use crate::support::stage::{Frames, Stage, write};
use crate::support::{execute, query_rows, query_value, wait_for, wait_until};
use standpipe_lab::bench::machine;

/// What a server does with every request.
#[derive(Clone, Copy, Debug)]
pub enum Behaviour {
    /// Says that it is asked too much.
    Busy,
    /// Never answers.
    Hangs,
    /// A byte a second.
    Trickles,
    /// Ten gigabytes.
    Floods,
}

pub struct Server {
    pub url: String,
    requests: Arc<AtomicU64>,
    /// Bytes that it has sent.
    sent: Arc<AtomicU64>,
    _serving: AbortOnDropHandle<()>,
}

impl Server {
    pub async fn start(behaviour: Behaviour) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(AtomicU64::new(0));
        let sent: Arc<AtomicU64> = Arc::default();
        let (count, bytes) = (Arc::clone(&requests), Arc::clone(&sent));
        let serving = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (count, bytes) = (Arc::clone(&count), Arc::clone(&bytes));
                tokio::spawn(async move {
                    // The client leaves when it has had enough.
                    let _ = answer(stream, behaviour, &count, &bytes).await;
                });
            }
        });
        Self { url, requests, sent, _serving: AbortOnDropHandle::new(serving) }
    }
}

async fn answer(
    mut stream: TcpStream,
    behaviour: Behaviour,
    requests: &AtomicU64,
    sent: &AtomicU64,
) -> std::io::Result<()> {
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        request.push(stream.read_u8().await?);
    }
    requests.fetch_add(1, Ordering::SeqCst);
    let head = |bytes: u64| format!("HTTP/1.1 200 OK\r\ncontent-length: {bytes}\r\n\r\n");
    match behaviour {
        Behaviour::Busy => {
            let answer = "HTTP/1.1 429 Too Many Requests\r\nretry-after: 600\r\ncontent-length: 0\r\n\r\n";
            stream.write_all(answer.as_bytes()).await?;
        }
        Behaviour::Hangs => {}
        Behaviour::Trickles => {
            stream.write_all(head(1_000_000).as_bytes()).await?;
            loop {
                stream.write_all(&[0]).await?;
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
        Behaviour::Floods => {
            stream.write_all(head(10_000_000_000).as_bytes()).await?;
            let part = vec![0; 1 << 16];
            loop {
                stream.write_all(&part).await?;
                sent.fetch_add(part.len() as u64, Ordering::SeqCst);
            }
        }
    }
    stream.read_u8().await?;
    Ok(())
}

/// Queues the repositories of accounts whose DIDs match, as repairs.
pub async fn queue(database: &str, dids: &[&Signed]) {
    let dids: Vec<String> = dids.iter().map(|account| format!("('{}')", account.did)).collect();
    let sql = format!(
        "INSERT INTO standpipe.repos AS r (did, state, class, reason)
         SELECT d.did, 'queued', 0, 'chain' FROM (VALUES {}) d (did)
         ON CONFLICT (did) DO UPDATE SET state = 'queued', class = 0, retry_at = now(), updated_at = now()",
        dids.join(", ")
    );
    execute(database, &sql).await;
}

/// How long it takes until these are synced.
async fn synced(database: &str, accounts: &[&Signed]) -> Duration {
    let began = Instant::now();
    let dids: Vec<String> = accounts.iter().map(|account| format!("'{}'", account.did)).collect();
    let sql = format!(
        "SELECT count(*) FROM standpipe.repos WHERE state <> 'synced' AND did IN ({})",
        dids.join(", ")
    );
    wait_for("the repositories of good servers to be repaired", RUN, async || {
        let left = query_value(database, &sql).await;
        if left == "0" { Ok(()) } else { Err(left) }
    })
    .await;
    began.elapsed()
}

#[tokio::test(flavor = "multi_thread")]
async fn servers_that_lie_hang_or_flood_cost_the_others_little() {
    let long = std::env::var_os("STANDPIPE_LONG").is_some();
    let (each, bad_each) = if long { (150, 12) } else { (50, 6) };
    let plc = Plc::start().await;
    let mut frames = Frames::default();
    let mut number = 0;
    let mut accounts = |count: usize, server: &str, frames: &mut Frames| -> Vec<Signed> {
        let mut made = Vec::new();
        for _ in 0..count {
            let mut account = Signed::new(number);
            number += 1;
            frames.commit(&mut account, &[write("a"), write("b"), write("c"), write("d")]);
            plc.put(&account.did, account.document(server));
            made.push(account);
        }
        made
    };
    let mut good = Vec::new();
    let mut servers = Vec::new();
    for _ in 0..4 {
        let server = Plc::start().await;
        let mut here = accounts(each, &server.url(), &mut frames);
        for account in &mut here {
            account.commit(0, &rev(5000), &[write("lost")]);
            server.serve(account);
        }
        good.extend(here);
        servers.push(server);
    }
    let mut bad: Vec<(&str, Vec<Signed>)> = Vec::new();
    let mut hostile = Vec::new();
    for (behaviour, says) in [
        (Behaviour::Busy, "429"),
        (Behaviour::Hangs, "no answer within"),
        (Behaviour::Trickles, "too slow"),
        (Behaviour::Floods, "larger than"),
    ] {
        let server = Server::start(behaviour).await;
        bad.push((says, accounts(bad_each, &server.url, &mut frames)));
        hostile.push(server);
    }
    for says in ["is that of", "older than", "archive", "it lacks the record"] {
        let server = Plc::start().await;
        let here = accounts(bad_each, &server.url(), &mut frames);
        for account in &here {
            let answer = match says {
                "is that of" => good[0].repository(),
                "older than" => {
                    let mut older = account.clone();
                    older.commit(0, &rev(0), &[]);
                    older.repository()
                }
                "archive" => Vec::new(),
                _ => account.repository_with_half(),
            };
            server.answer(&account.did, Answer::ok(answer));
        }
        bad.push((says, here));
        servers.push(server);
    }
    let count = frames.0.len();
    let mut stage = Stage::start(plc, frames.0, &[]).await;
    stage.send(count).await;
    stage.all_checked().await;
    let database = stage.chain.database.clone();
    let good: Vec<&Signed> = good.iter().collect();
    queue(&database, &good).await;
    println!("healed in {:.1?}", synced(&database, &good).await);
    let rows = good.len() * 5 + bad.len() * bad_each * 4;
    assert_eq!(query_value(&database, "SELECT count(*) FROM posts").await, rows.to_string());

    queue(&database, &good).await;
    let alone = synced(&database, &good).await;
    let all_bad: Vec<&Signed> = bad.iter().flat_map(|(_, accounts)| accounts).collect();
    // What a server would have to be newer than.
    let flooded = Instant::now();
    queue(&database, &all_bad).await;
    let wanted = format!("UPDATE standpipe.repos SET wanted_rev = '{}' WHERE state = 'queued'", rev(1));
    execute(&database, &wanted).await;
    queue(&database, &good).await;
    let beside = synced(&database, &good).await;
    let ratio = alone.as_secs_f64() / beside.as_secs_f64();
    println!(
        "{} repositories of good servers: {alone:.1?} alone, {beside:.1?} beside bad ones: {ratio:.2}",
        good.len()
    );

    for (says, accounts) in &bad {
        let dids: Vec<String> = accounts.iter().map(|account| format!("'{}'", account.did)).collect();
        let sql = format!(
            "SELECT DISTINCT state || ': ' || message FROM standpipe.repos WHERE did IN ({})",
            dids.join(", ")
        );
        wait_for(&format!("the queue to say {says}"), RUN, async || {
            let found = query_rows(&database, &sql).await;
            let is_said = |row: &Vec<Option<String>>| row[0].as_ref().is_some_and(|text| text.contains(says));
            if found.iter().any(is_said) { Ok(()) } else { Err(format!("{found:?}")) }
        })
        .await;
    }
    // Two can be under way before the first answer.
    let asked = hostile[0].requests.load(Ordering::SeqCst);
    assert!(asked <= 2, "it was asked {asked} times before its Retry-After");
    // What is allowed at once, two transfers that were under way by then, what may stand in the sockets' buffers, and what is
    // allowed each second.
    let sent = hostile[3].sent.load(Ordering::SeqCst) >> 20;
    let allowed = 64 + 2 * 64 + 16 + (6.4 * flooded.elapsed().as_secs_f64()) as u64;
    println!("{sent} MiB of a flood, {allowed} at most");
    assert!(sent <= allowed, "{sent} MiB of a flood");
    for server in &hostile {
        assert!(server.requests.load(Ordering::SeqCst) > 0, "{} was never asked", server.url);
    }
    assert_eq!(query_value(&database, "SELECT count(*) FROM posts").await, rows.to_string());
    let lost = "SELECT count(*) FROM standpipe.repos WHERE state NOT IN ('synced', 'queued')";
    assert_eq!(query_value(&database, lost).await, "0");
    wait_until("everything to be applied", RUN, async || stage.chain.look().await.is_drained()).await;
    let peak = machine::peak_memory(stage.program.pid()).unwrap();
    println!("{} MiB at most", peak >> 20);
    assert!(peak < 256 << 20, "{} MiB", peak >> 20);
    // Elsewhere, a machine that does everything at once says little about speed.
    assert!(!long || ratio >= 0.5, "{ratio}");
}
