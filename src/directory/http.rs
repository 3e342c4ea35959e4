//! Bounded HTTP requests to hosts that others chose.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::Incoming;
use hyper::header::{HOST, HeaderMap, RETRY_AFTER, USER_AGENT};
use hyper::{Request, Response, Uri};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;

use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::guard::Guard;
use super::repository::{LARGE, LONGEST, SLOWEST, SLOWEST_LARGE, SPEED};
use super::tls;
use crate::config::Config;

/// Time limit for a connection.
const CONNECT: Duration = Duration::from_secs(3);
/// Idle connections kept per host, and for how long.
const IDLE: (usize, Duration) = (8, Duration::from_secs(30));

/// An answer, read in full.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// The body.
    pub body: Bytes,
    /// How long the host asks us to wait.
    pub retry_after: Option<Duration>,
}

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HttpError {
    /// We do not ask this address, or the answer is larger than allowed.
    #[error("{0}")]
    Refused(String),
    /// The host cannot be reached, or ended the connection.
    #[error("{0}")]
    Failed(String),
    /// It takes too long.
    #[error("{0}")]
    Slow(String),
}

/// A client.
pub struct Http {
    client: Client<HttpsConnector<HttpConnector<Guard>>, Empty<Bytes>>,
    guard: Guard,
}

impl Http {
    /// A client that also asks `trusted`, wherever they are: the operator named them.
    ///
    /// # Errors
    ///
    /// There is no authority to trust.
    pub(super) fn new(config: &Config, trusted: [String; 2]) -> anyhow::Result<Self> {
        let guard = Guard { trusted: trusted.into(), private: config.allow_private_addresses };
        let mut connector = HttpConnector::new_with_resolver(guard.clone());
        connector.enforce_http(false);
        connector.set_connect_timeout(Some(CONNECT));
        connector.set_nodelay(true);
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(tls::trusting(config.relay_ca.as_ref(), true)?)
            .https_or_http()
            .enable_http1()
            .wrap_connector(connector);
        let client = Client::builder(TokioExecutor::new())
            .pool_max_idle_per_host(IDLE.0)
            .pool_idle_timeout(IDLE.1)
            .pool_timer(hyper_util::rt::TokioTimer::new())
            .build(connector);
        Ok(Self { client, guard })
    }

    /// Asks for `url`. Redirects are not followed. The caller limits the time.
    ///
    /// # Errors
    ///
    /// [`HttpError`].
    pub async fn get(&self, url: &str, max_bytes: usize) -> Result<Answer, HttpError> {
        self.get_as(url, None, max_bytes).await
    }

    /// The same, asking for another host of that server.
    ///
    /// # Errors
    ///
    /// [`HttpError`].
    pub(super) async fn get_as(
        &self,
        url: &str,
        host: Option<&str>,
        max_bytes: usize,
    ) -> Result<Answer, HttpError> {
        let answer = self.ask(url, host).await?;
        let status = answer.status().as_u16();
        let retry_after = retry_after(answer.headers());
        let body = Limited::new(answer.into_body(), max_bytes).collect().await.map_err(|error| {
            if error.is::<http_body_util::LengthLimitError>() {
                return too_large(max_bytes);
            }
            HttpError::Failed(error.to_string())
        })?;
        Ok(Answer { status, body: body.to_bytes(), retry_after })
    }

    /// Downloads `url`, however long that takes, unless it is too slow. What is large waits for `large`.
    ///
    /// # Errors
    ///
    /// [`HttpError`].
    pub(super) async fn download(
        &self,
        url: &str,
        max_bytes: usize,
        large: &Semaphore,
        received: impl Fn(usize),
    ) -> Result<Answer, HttpError> {
        let slow = |_| HttpError::Slow(format!("no answer within {SPEED:?}"));
        let answer = tokio::time::timeout(SPEED, self.ask(url, None)).await.map_err(slow)??;
        let status = answer.status().as_u16();
        let retry_after = retry_after(answer.headers());
        let mut body = answer.into_body();
        let mut bytes = BytesMut::new();
        let mut turn = None;
        let began = Instant::now();
        let mut since = (began, 0);
        loop {
            if began.elapsed() > LONGEST {
                return Err(HttpError::Slow(format!("not complete within {} s", LONGEST.as_secs())));
            }
            let frame = tokio::time::timeout(SPEED, body.frame());
            let Some(frame) =
                frame.await.map_err(|_| HttpError::Slow(format!("nothing within {SPEED:?}")))?
            else {
                break;
            };
            let frame = frame.map_err(|error| HttpError::Failed(error.to_string()))?;
            let Some(data) = frame.data_ref() else { continue };
            received(data.len());
            if bytes.len() + data.len() > max_bytes {
                return Err(too_large(max_bytes));
            }
            bytes.extend_from_slice(data);
            if bytes.len() > LARGE && turn.is_none() {
                turn = large.acquire().await.ok();
                since = (Instant::now(), bytes.len());
            }
            let elapsed = since.0.elapsed();
            if elapsed >= SPEED {
                let speed = (bytes.len() - since.1) as u64 / elapsed.as_secs().max(1);
                // Others wait for the turn.
                let slowest = if turn.is_some() { SLOWEST_LARGE } else { SLOWEST };
                if speed < slowest {
                    return Err(HttpError::Slow(format!("{speed} bytes per second are too slow")));
                }
                since = (Instant::now(), bytes.len());
            }
        }
        Ok(Answer { status, body: bytes.freeze(), retry_after })
    }

    async fn ask(&self, url: &str, host: Option<&str>) -> Result<Response<Incoming>, HttpError> {
        let uri: Uri = url.parse().map_err(|_| HttpError::Refused("not a URL".to_owned()))?;
        if !uri.host().is_some_and(|host| self.guard.allows_host(host)) {
            return Err(HttpError::Refused("not a public address".to_owned()));
        }
        let mut request =
            Request::get(uri).header(USER_AGENT, concat!("standpipe/", env!("CARGO_PKG_VERSION")));
        if let Some(host) = host {
            request = request.header(HOST, host);
        }
        let request = request.body(Empty::new()).map_err(|error| HttpError::Refused(error.to_string()))?;
        self.client.request(request).await.map_err(|error| failure(&error))
    }
}

fn too_large(max_bytes: usize) -> HttpError {
    HttpError::Refused(format!("the answer is larger than {max_bytes} bytes"))
}

fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds = headers.get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds))
}

/// The innermost cause says most.
fn failure(error: &hyper_util::client::legacy::Error) -> HttpError {
    let mut cause: &dyn std::error::Error = error;
    while let Some(inner) = cause.source() {
        if inner
            .downcast_ref::<std::io::Error>()
            .is_some_and(|e| e.kind() == std::io::ErrorKind::PermissionDenied)
        {
            return HttpError::Refused(inner.to_string());
        }
        cause = inner;
    }
    HttpError::Failed(cause.to_string())
}
