//! Fetching a whole repository from its account's server (`com.atproto.sync.getRepo`).

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use serde::Deserialize;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::http::{Answer, HttpError};
use super::{Directory, host_of};
use crate::mutex::lock;

/// The largest repository that is read: it is compared in memory.
pub const MAX_REPOSITORY: usize = 64 * 1024 * 1024;
/// Beyond this size, one is read at a time.
pub(super) const LARGE: usize = 8 * 1024 * 1024;
/// A transfer that is slower than this, in bytes per second, is given up.
pub(super) const SLOWEST: u64 = 10 * 1024;
/// The same while others wait for this one to end.
pub(super) const SLOWEST_LARGE: u64 = 256 * 1024;
/// So is one that takes longer than this, however fast it is.
pub(super) const LONGEST: Duration = Duration::from_mins(15);
/// The speed is looked at this often.
pub(super) const SPEED: Duration = Duration::from_secs(10);
/// Repositories fetched from one host at a time.
const PER_HOST: usize = 2;
/// Hosts whose slots are remembered.
const MAX_HOSTS: usize = 10_000;

/// Why there is no repository.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FetchError {
    /// The account has none to give: it was taken down, suspended, deactivated or deleted.
    #[error("{0}")]
    Gone(String),
    /// It cannot be fetched from there, and trying again at once is no use.
    #[error("{0}")]
    Refused(String),
    /// The host was not asked: others come first, or it wants to be left alone for so long.
    #[error("{reason}")]
    Busy {
        /// In words.
        reason: String,
        /// How long to wait.
        wait: Duration,
    },
    /// Later is worth a try, after this pause if the host asks for one.
    #[error("{reason}")]
    Away {
        /// In words.
        reason: String,
        /// What the host asks for.
        retry_after: Option<Duration>,
    },
}

/// Why nothing is fetched from a domain for a while.
pub const OVER_BUDGET: &str =
    "much was fetched from its domain lately; the repositories of others come first";

/// The slots of each host.
#[derive(Default)]
pub(super) struct Hosts(Mutex<HashMap<String, Arc<Semaphore>>>);

impl Hosts {
    fn slots(&self, host: &str) -> Arc<Semaphore> {
        let mut hosts = lock(&self.0);
        if hosts.len() >= MAX_HOSTS {
            // Those that nobody uses now.
            hosts.retain(|_, slots| Arc::strong_count(slots) > 1);
        }
        Arc::clone(hosts.entry(host.to_owned()).or_insert_with(|| Arc::new(Semaphore::new(PER_HOST))))
    }
}

/// A server's error.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Answered {
    error: String,
    message: String,
}

impl Directory {
    /// How long to wait before anything is fetched for a repair from a server's domain; `None` if it may be now.
    #[must_use]
    pub fn budget_wait(&self, server: &str) -> Option<Duration> {
        self.budgets.wait(&host_of(server), Instant::now())
    }

    /// The repository of `did`, from `server`. Returns the archive as it was sent. With `limited`, only so much is fetched from
    /// one domain.
    ///
    /// # Errors
    ///
    /// [`FetchError`].
    pub async fn repository(&self, did: &str, server: &str, limited: bool) -> Result<Bytes, FetchError> {
        let server = server.trim_end_matches('/');
        let may_be_asked = server.starts_with("https://") || (self.private && server.starts_with("http://"));
        if !may_be_asked {
            return Err(FetchError::Refused(format!("{server:.100} is not an https:// address")));
        }
        let host = host_of(server);
        if let Some(wait) = self.wait(&host) {
            let reason = format!("{host} asks us to wait {} s more", wait.as_secs() + 1);
            return Err(FetchError::Busy { reason, wait });
        }
        if let Some(wait) = self.budgets.wait(&host, Instant::now()).filter(|_| limited) {
            let reason = format!("{host}: {OVER_BUDGET}");
            return Err(FetchError::Busy { reason, wait });
        }
        let slots = self.hosts.slots(&host);
        let Ok(_slot) = slots.try_acquire() else {
            let reason = format!("{host}: other repositories come first");
            return Err(FetchError::Busy { reason, wait: Duration::from_secs(1) });
        };
        let url = format!("{server}/xrpc/com.atproto.sync.getRepo?did={did}");
        let received = |bytes| {
            if limited {
                self.budgets.spend(&host, bytes, Instant::now());
            }
        };
        let download = self.http.download(&url, MAX_REPOSITORY, &self.large, received);
        let answer = download.await.map_err(|error| {
            let reason = format!("{host}: {error}");
            match error {
                HttpError::Refused(_) => FetchError::Refused(reason),
                HttpError::Failed(_) => FetchError::Away { reason, retry_after: None },
                HttpError::Slow(_) => {
                    self.hung(server);
                    FetchError::Away { reason, retry_after: self.wait(&host) }
                }
            }
        })?;
        self.answers(&host);
        self.judge(&host, answer)
    }

    /// What a server's answer says.
    fn judge(&self, host: &str, answer: Answer) -> Result<Bytes, FetchError> {
        match answer.status {
            200 => Ok(answer.body),
            400 | 404 => {
                let answered: Answered = serde_json::from_slice(&answer.body).unwrap_or_default();
                let reason = format!("{host}: {:.50} {:.200}", answered.error, answered.message);
                match answered.error.as_str() {
                    "RepoNotFound" | "RepoTakendown" | "RepoSuspended" | "RepoDeactivated" => {
                        Err(FetchError::Gone(reason))
                    }
                    _ => Err(FetchError::Refused(format!("{host}: HTTP {}", answer.status))),
                }
            }
            status => {
                if matches!(status, 429 | 503) {
                    self.close(host, &answer);
                }
                let reason = format!("{host}: HTTP {status}");
                Err(FetchError::Away { reason, retry_after: self.wait(host) })
            }
        }
    }
}
