//! A minimal HTTP client with which the command line talks to a running process.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::config::AccessToken;

/// Fetches `path` from the process that serves `address`; returns status code and body.
///
/// # Errors
///
/// No answer within `limit`, or not in HTTP.
pub async fn get(address: SocketAddr, path: &str, limit: Duration) -> Result<(u16, String)> {
    ask(address, "GET", path, "", b"", limit).await
}

/// Posts to `path` with the admin token; returns status code and body.
///
/// # Errors
///
/// As for [`get`].
pub async fn post(
    address: SocketAddr,
    path: &str,
    token: &AccessToken,
    limit: Duration,
) -> Result<(u16, String)> {
    let headers = format!("Authorization: Bearer {}\r\nContent-Length: 0\r\n", token.expose());
    ask(address, "POST", path, &headers, b"", limit).await
}

/// Sends events to `POST /events`; returns status code and body. `key` is the request's Idempotency-Key.
///
/// # Errors
///
/// As for [`get`].
pub async fn send_events(
    address: SocketAddr,
    path: &str,
    (token, key): (&AccessToken, &str),
    events: &[u8],
    limit: Duration,
) -> Result<(u16, String)> {
    let headers = format!(
        "Authorization: Bearer {}\r\nIdempotency-Key: {key}\r\nContent-Length: {}\r\n",
        token.expose(),
        events.len()
    );
    ask(address, "POST", path, &headers, events, limit).await
}

async fn ask(
    address: SocketAddr,
    method: &str,
    path: &str,
    headers: &str,
    body: &[u8],
    limit: Duration,
) -> Result<(u16, String)> {
    tokio::time::timeout(limit, fetch(reachable(address), method, path, headers, body))
        .await
        .with_context(|| format!("no answer from {address} within {limit:?}"))?
}

/// The address to connect to: loopback if the process listens on all interfaces.
fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}

async fn fetch(
    address: SocketAddr,
    method: &str,
    path: &str,
    headers: &str,
    body: &[u8],
) -> Result<(u16, String)> {
    let mut socket =
        TcpStream::connect(address).await.with_context(|| format!("nothing listens on {address}"))?;
    let request =
        format!("{method} {path} HTTP/1.1\r\nHost: {address}\r\n{headers}Connection: close\r\n\r\n");
    socket.write_all(request.as_bytes()).await?;
    // A server that refuses a request may answer before it has read all of it.
    let _ = socket.write_all(body).await;
    let mut answer = Vec::new();
    socket.take(16 << 20).read_to_end(&mut answer).await?;
    let answer = String::from_utf8_lossy(&answer);
    let (head, body) = answer.split_once("\r\n\r\n").context("the answer is not HTTP")?;
    let code = head.split(' ').nth(1).and_then(|code| code.parse().ok()).context("the answer is not HTTP")?;
    if head.to_ascii_lowercase().contains("transfer-encoding: chunked") {
        bail!("the answer is chunked, which standpipe never sends");
    }
    Ok((code, body.to_owned()))
}
