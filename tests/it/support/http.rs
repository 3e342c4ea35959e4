//! Just enough HTTP for the tests.

use anyhow::{Context, Result};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, ToSocketAddrs};

/// GETs `path` and returns the status and the body.
///
/// An error if nobody listens there or the answer is not HTTP, so that a test can wait for a server to come
/// up.
pub async fn http_get(address: impl ToSocketAddrs, path: &str) -> Result<(u16, String)> {
    http_request(address, "GET", path, "", b"").await
}

/// POSTs a body with these headers, each of which ends with a line break, and returns the status and the body.
pub async fn http_post(
    address: impl ToSocketAddrs,
    path: &str,
    headers: &str,
    body: &[u8],
) -> Result<(u16, String)> {
    http_request(address, "POST", path, headers, body).await
}

/// As the two above, with any method.
pub async fn http_request(
    address: impl ToSocketAddrs,
    method: &str,
    path: &str,
    headers: &str,
    body: &[u8],
) -> Result<(u16, String)> {
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {}\r\n{headers}\r\n",
        body.len()
    );
    ask(address, &head, body).await
}

async fn ask(address: impl ToSocketAddrs, head: &str, body: &[u8]) -> Result<(u16, String)> {
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(head.as_bytes()).await?;
    // A server that refuses may answer before it has read everything.
    let _ = stream.write_all(body).await;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;

    let end = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n").context("no end of the headers")?;
    let head = String::from_utf8_lossy(&answer[..end]).to_ascii_lowercase();
    let status = head
        .split_whitespace()
        .nth(1)
        .and_then(|status| status.parse().ok())
        .with_context(|| format!("no status in {head:?}"))?;
    let body = &answer[end + 4..];
    let body = if head.contains("transfer-encoding: chunked") { unchunk(body)? } else { body.to_vec() };
    Ok((status, String::from_utf8(body)?))
}

fn unchunk(mut rest: &[u8]) -> Result<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let end = rest.windows(2).position(|bytes| bytes == b"\r\n").context("a chunk without a length")?;
        let length = std::str::from_utf8(&rest[..end])?;
        let length = usize::from_str_radix(length.split(';').next().unwrap_or(length).trim(), 16)?;
        if length == 0 {
            return Ok(body);
        }
        let chunk = rest.get(end + 2..end + 2 + length).context("a chunk is cut off")?;
        body.extend_from_slice(chunk);
        rest = rest.get(end + 2 + length + 2..).context("a chunk is cut off")?;
    }
}
