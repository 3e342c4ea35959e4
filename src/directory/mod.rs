//! DID documents: did:plc at `PLC_URL`, did:web at the host that it names (<https://atproto.com/specs/did>); and whole
//! repositories, at the account's server.
//!
//! The creator of an account chooses the host that we contact. Requests are therefore small, limited in time and number,
//! follow no redirects, and never go to internal addresses: [`guard`].

mod budget;
mod guard;
mod handle;
pub mod http;
pub mod listing;
pub mod repository;
pub mod tls;

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::Instant;

use self::http::{Answer, Http, HttpError};
use crate::config::Config;
use crate::metrics;
use crate::mutex::lock;
use crate::verify::document::Document;

/// Lookups at a time.
const SLOTS: usize = 64;
/// Time limit of one lookup.
const TIME_LIMIT: Duration = Duration::from_secs(5);
/// The largest document that is read.
const MAX_DOCUMENT: usize = 256 * 1024;
/// How long a host is left alone that answers 429 or 503 without saying for how long.
const BACK_OFF: Duration = Duration::from_secs(10);
/// How long a directory is left alone that has not answered in time.
const HUNG: Duration = Duration::from_secs(5);
/// Upper bound for a host's Retry-After.
const MAX_BACK_OFF: Duration = Duration::from_mins(10);
/// How long a document counts as just looked up, and how many are kept.
const RECENT: Duration = Duration::from_mins(1);
const MAX_RECENT: usize = 4096;
/// Hosts whose wishes are remembered.
const MAX_HOSTS: usize = 10_000;

/// Why there is no document.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LookupError {
    /// There is no such account, or its DID cannot be looked up.
    #[error("{0}")]
    None(String),
    /// The host cannot be reached or refuses. Later is worth a try.
    #[error("{0}")]
    Away(String),
}

/// What is remembered about a host.
#[derive(Clone, Copy, Default)]
struct Closed {
    /// When it may be asked again.
    until: Option<Instant>,
    /// How often in a row it has hung.
    hung: u32,
}

/// Looks up DID documents.
pub struct Directory {
    http: Http,
    plc: String,
    /// Whether did:web may name a host of this network, for development.
    private: bool,
    slots: Semaphore,
    /// Hosts that are to be left alone, and those that hung when they were last asked.
    closed: Mutex<HashMap<String, Closed>>,
    /// Documents that were just looked up.
    recent: Mutex<HashMap<String, (Instant, Document)>>,
    hosts: repository::Hosts,
    budgets: budget::Budgets,
    /// Held while a large repository is read.
    large: Semaphore,
}

impl Directory {
    /// For the configured directory.
    ///
    /// # Errors
    ///
    /// There is no authority for https:// to trust.
    pub fn new(config: &Config) -> anyhow::Result<Self> {
        let plc = config.plc_url.expose().trim_end_matches('/').to_owned();
        Ok(Self {
            http: Http::new(config, [config.plc_url.host(), config.relay_url.host().to_owned()])?,
            plc,
            private: config.allow_private_addresses,
            slots: Semaphore::new(SLOTS),
            closed: Mutex::default(),
            recent: Mutex::default(),
            hosts: repository::Hosts::default(),
            budgets: budget::Budgets::default(),
            large: Semaphore::new(1),
        })
    }

    /// The document of `did`.
    ///
    /// # Errors
    ///
    /// [`LookupError`]; each is counted.
    pub async fn document(&self, did: &str) -> Result<Document, LookupError> {
        self.document_within(did, TIME_LIMIT).await
    }

    /// The document of `did`, if it comes within this time.
    ///
    /// # Errors
    ///
    /// [`LookupError`]; each is counted.
    pub async fn document_within(&self, did: &str, limit: Duration) -> Result<Document, LookupError> {
        let looked_up = self.look_up(did, limit).await;
        metrics::lookup(match &looked_up {
            Ok(_) => "found",
            Err(LookupError::None(_)) => "none",
            Err(LookupError::Away(_)) => "away",
        });
        if let Ok(document) = &looked_up {
            let mut recent = lock(&self.recent);
            if recent.len() >= MAX_RECENT {
                recent.clear();
            }
            recent.insert(did.to_owned(), (Instant::now(), document.clone()));
        }
        looked_up
    }

    /// The document of `did` as it was a moment ago, or is now.
    async fn recent_document(&self, did: &str) -> Result<Document, LookupError> {
        let recent = lock(&self.recent).get(did).cloned();
        match recent {
            Some((at, document)) if at.elapsed() < RECENT => Ok(document),
            _ => self.document(did).await,
        }
    }

    /// The account says that its document has changed.
    pub fn forget(&self, did: &str) {
        lock(&self.recent).remove(did);
    }

    async fn look_up(&self, did: &str, limit: Duration) -> Result<Document, LookupError> {
        let url = self.url(did)?;
        let host = host_of(&url);
        self.wait_is_over(&host)?;
        let Ok(_slot) = self.slots.acquire().await else {
            return Err(LookupError::Away("the program is stopping".to_owned()));
        };
        let asked = tokio::time::timeout(limit, self.http.get(&url, MAX_DOCUMENT)).await;
        let away = |reason: String| LookupError::Away(format!("{host}: {reason}"));
        let answer = match asked {
            Err(_) => {
                // Or each of thousands of lookups would wait as long.
                self.leave_alone(&host, HUNG);
                return Err(away(format!("no answer within {} s", limit.as_secs())));
            }
            Ok(Err(HttpError::Refused(reason))) => {
                return Err(LookupError::None(format!("{host}: {reason}")));
            }
            Ok(Err(error)) => return Err(away(error.to_string())),
            Ok(Ok(answer)) => answer,
        };
        match answer.status {
            200 => Document::read(did, &answer.body)
                .map_err(|error| LookupError::None(format!("{host}: {error}"))),
            404 | 410 => Err(LookupError::None(format!("{host} does not know {did}"))),
            status => {
                if matches!(status, 429 | 503) {
                    self.close(&host, &answer);
                }
                Err(away(format!("HTTP {status}")))
            }
        }
    }

    /// Where the document is.
    fn url(&self, did: &str) -> Result<String, LookupError> {
        if let Some(id) = did.strip_prefix("did:plc:")
            && id.len() == 24
            && id.bytes().all(|c| matches!(c, b'a'..=b'z' | b'2'..=b'7'))
        {
            return Ok(format!("{}/{did}", self.plc));
        }
        let unknown =
            || LookupError::None(format!("{did:.60} cannot be looked up: neither did:plc nor did:web"));
        let host = did.strip_prefix("did:web:").ok_or_else(unknown)?;
        // The protocol allows neither paths nor, outside of development, ports.
        if let Some(port) = host.strip_prefix("localhost%3A").and_then(|port| port.parse::<u16>().ok()) {
            let url = format!("http://localhost:{port}/.well-known/did.json");
            return if self.private { Ok(url) } else { Err(unknown()) };
        }
        let plain = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'.');
        let named =
            host.split('.').next_back().is_some_and(|last| last.bytes().any(|c| c.is_ascii_alphabetic()));
        if host.len() > 253 || !host.contains('.') || !host.bytes().all(plain) || !named {
            return Err(unknown());
        }
        Ok(format!("https://{host}/.well-known/did.json"))
    }

    /// Whether the host has asked us to stay away until later.
    fn wait_is_over(&self, host: &str) -> Result<(), LookupError> {
        match self.wait(host) {
            Some(left) => {
                Err(LookupError::Away(format!("{host} asks us to wait {} s more", left.as_secs() + 1)))
            }
            None => Ok(()),
        }
    }

    /// How long the host still has to be left alone.
    fn wait(&self, host: &str) -> Option<Duration> {
        let left = lock(&self.closed).get(host)?.until?.saturating_duration_since(Instant::now());
        (!left.is_zero()).then_some(left)
    }

    fn close(&self, host: &str, answer: &Answer) {
        self.leave_alone(host, answer.retry_after.unwrap_or(BACK_OFF).min(MAX_BACK_OFF));
    }

    fn leave_alone(&self, host: &str, wait: Duration) {
        let mut closed = lock(&self.closed);
        let Closed { until, hung } = closed.get(host).copied().unwrap_or_default();
        let until = until.max(Some(Instant::now() + wait));
        insert(&mut closed, host, Closed { until, hung });
    }

    /// A server was too slow for a repository: the next one waits, and longer each time.
    pub fn hung(&self, server: &str) {
        let host = host_of(server);
        let now = Instant::now();
        let mut closed = lock(&self.closed);
        let Closed { until, hung } = closed.get(&host).copied().unwrap_or_default();
        // Else this is one of several requests that hung together.
        if until.is_none_or(|until| until <= now) {
            let wait = BACK_OFF.saturating_mul(1 << hung.min(10)).min(MAX_BACK_OFF);
            insert(&mut closed, &host, Closed { until: Some(now + wait), hung: hung + 1 });
        }
    }

    /// The host does what is asked.
    fn answers(&self, host: &str) {
        let mut closed = lock(&self.closed);
        if closed.get(host).is_some_and(|closed| closed.until <= Some(Instant::now())) {
            closed.remove(host);
        }
    }
}

fn insert(closed: &mut HashMap<String, Closed>, host: &str, what: Closed) {
    if closed.len() >= MAX_HOSTS {
        let now = Some(Instant::now());
        closed.retain(|_, closed| closed.until > now);
    }
    if closed.len() < MAX_HOSTS {
        closed.insert(host.to_owned(), what);
    }
}

/// Host and port of a URL, in the one form under which the host's limits are kept.
fn host_of(url: &str) -> String {
    let (scheme, rest) = url.split_once("://").unwrap_or(("", url));
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    let host = authority.rsplit('@').next().unwrap_or_default().to_ascii_lowercase();
    let default = if scheme.eq_ignore_ascii_case("http") { ":80" } else { ":443" };
    host.strip_suffix(default).map_or_else(|| host.trim_end_matches('.').to_owned(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::host_of;

    #[test]
    fn a_host_has_one_name_however_its_url_is_written() {
        for url in [
            "https://pds.example",
            "https://PDS.example:443/x",
            "HTTPS://u@pds.example?x",
            "https://pds.example./#x",
        ] {
            assert_eq!(host_of(url), "pds.example", "{url}");
        }
        assert_eq!(host_of("http://localhost:80/"), "localhost");
        assert_eq!(host_of("http://localhost:2470/x"), "localhost:2470");
        assert_eq!(host_of("https://pds.example:8443"), "pds.example:8443");
    }
}
