//! Opening the websocket to a relay or a Jetstream, and explaining failures.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::http::{Response, StatusCode, header};
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{self};
use tokio_tungstenite::{Connector, MaybeTlsStream, WebSocketStream};

use crate::config::Config;
use crate::directory::tls;

/// The largest message that a relay may send is 5 MB (<https://atproto.com/specs/sync>).
pub const MESSAGE_BYTES: usize = 8 * 1024 * 1024;
/// A message up to this size is read, in order to skip it, once it has cost enough connections.
pub const PASSED_OVER_BYTES: usize = 64 * 1024 * 1024;
/// A connection that has lasted this long without a message counts as idle, not stuck.
pub const STEADY: Duration = Duration::from_secs(30);
/// Time limit for the closing handshake.
pub const GOODBYE: Duration = Duration::from_secs(1);
/// Write buffer, mostly for pongs. Bounds what a relay costs that sends pings and reads nothing.
const WRITE_BYTES: usize = 1024 * 1024;
/// Upper bound for the relay's Retry-After.
const MAX_RETRY_AFTER: Duration = Duration::from_mins(10);

/// An open connection.
pub type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

/// Why there is no connection.
#[derive(Debug)]
pub struct Refused {
    /// In words.
    pub reason: String,
    /// The relay's Retry-After.
    pub retry_after: Option<Duration>,
}

impl From<String> for Refused {
    fn from(reason: String) -> Self {
        Self { reason, retry_after: None }
    }
}

/// Encrypted connections to the relay trust the authorities in `RELAY_CA_FILE` alone, if it is set.
///
/// # Errors
///
/// There is no authority to trust.
pub fn tls(config: &Config) -> Result<Connector> {
    let tls = match &config.relay_ca {
        Some(ca) => tls::trusting(Some(ca), false)?,
        None => tls::trusting(None, true)?,
    };
    Ok(Connector::Rustls(Arc::new(tls)))
}

/// Connects to `url` (with its cursor), for messages of at most `message_bytes`. `relay` is the relay's name.
///
/// # Errors
///
/// The relay cannot be reached or refuses.
pub async fn open(url: String, relay: &str, tls: Connector, message_bytes: usize) -> Result<Socket, Refused> {
    let encrypted = url.starts_with("wss:");
    let limits = WebSocketConfig::default()
        .max_message_size(Some(message_bytes))
        .max_frame_size(Some(message_bytes))
        .max_write_buffer_size(WRITE_BYTES);
    let connect = tokio_tungstenite::connect_async_tls_with_config(url, Some(limits), true, Some(tls));
    match tokio::time::timeout(Duration::from_secs(15), connect).await {
        Ok(Ok((socket, _))) => Ok(socket),
        Ok(Err(tungstenite::Error::Http(response))) => Err(answered(relay, &response)),
        Ok(Err(error)) => Err(explain(&error.to_string(), encrypted).into()),
        Err(_) => Err("no connection within 15 s".to_owned().into()),
    }
}

fn answered(relay: &str, response: &Response<Option<Vec<u8>>>) -> Refused {
    let asked = response.headers().get(header::RETRY_AFTER).and_then(|value| value.to_str().ok());
    let retry_after = asked.and_then(|value| {
        let seconds = value.trim().parse().ok().map(Duration::from_secs);
        seconds.map(|seconds| seconds.min(MAX_RETRY_AFTER))
    });
    let status = response.status();
    let hint = match status {
        StatusCode::NOT_FOUND => ": it does not serve this path",
        StatusCode::BAD_REQUEST => ": if it expects TLS, write wss:// in RELAY_URL",
        _ => "",
    };
    Refused { reason: format!("{relay} answered HTTP {status}{hint}"), retry_after }
}

/// Explains the library's terse errors.
fn explain(error: &str, encrypted: bool) -> String {
    if encrypted && error.contains("InvalidContentType") {
        return format!("this port does not speak TLS; did you mean ws:// in RELAY_URL? ({error})");
    }
    if error.contains("UnknownIssuer") {
        return format!(
            "its certificate is not signed by a trusted authority; name the authority in RELAY_CA_FILE ({error})"
        );
    }
    error.to_owned()
}
