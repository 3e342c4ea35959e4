//! The accounts that a relay lists (`com.atproto.sync.listRepos`, `listReposByCollection`).

use serde::Deserialize;

use super::{Directory, LookupError, host_of};
use crate::config::Backfill;

/// Accounts asked for at a time: as many as a relay gives.
const PAGE: usize = 1000;
/// The largest page that is read.
const MAX_PAGE: usize = 4 * 1024 * 1024;
/// Time limit of one page.
const TIME_LIMIT: std::time::Duration = std::time::Duration::from_secs(30);
/// The longest cursor and account that are kept.
const MAX_TEXT: usize = 2048;
/// The longest status that is kept.
const MAX_STATUS: usize = 64;

/// A part of the list.
#[derive(Debug)]
pub struct Page {
    /// Its accounts.
    pub accounts: Vec<Account>,
    /// Where to continue; `None` at the end.
    pub cursor: Option<String>,
}

/// An account on the list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    /// Who it is.
    pub did: String,
    /// The last revision that the relay knows of; empty if it does not say.
    pub rev: String,
    /// Whether it has something to show.
    pub active: bool,
    /// What is to be said of it, such as `deactivated`.
    pub status: Option<String>,
}

#[derive(Deserialize)]
struct Listed {
    cursor: Option<String>,
    repos: Vec<Repo>,
}

#[derive(Deserialize)]
struct Repo {
    did: String,
    #[serde(default)]
    rev: String,
    active: Option<bool>,
    status: Option<String>,
}

impl Directory {
    /// Some of the accounts that `relay` lists, from a cursor on.
    ///
    /// # Errors
    ///
    /// [`LookupError`].
    pub async fn listed(
        &self,
        relay: &str,
        what: &Backfill,
        cursor: Option<&str>,
    ) -> Result<Page, LookupError> {
        let host = host_of(relay);
        self.wait_is_over(&host)?;
        let (method, collection) = match what {
            Backfill::Collection(nsid) => ("com.atproto.sync.listReposByCollection", Some(nsid.as_str())),
            Backfill::All | Backfill::Seen => ("com.atproto.sync.listRepos", None),
        };
        let query = url::form_urlencoded::Serializer::new(format!("limit={PAGE}"))
            .extend_pairs(collection.map(|nsid| ("collection", nsid)))
            .extend_pairs(cursor.map(|cursor| ("cursor", cursor)))
            .finish();
        let url = format!("{relay}/xrpc/{method}?{query}");
        let away = |reason: String| LookupError::Away(format!("{host}: {reason}"));
        let asked = tokio::time::timeout(TIME_LIMIT, self.http.get(&url, MAX_PAGE)).await;
        let answer = match asked {
            Err(_) => return Err(away(format!("no answer within {} s", TIME_LIMIT.as_secs()))),
            Ok(Err(error)) => return Err(away(error.to_string())),
            Ok(Ok(answer)) => answer,
        };
        if answer.status != 200 {
            if matches!(answer.status, 429 | 503) {
                self.close(&host, &answer);
            }
            return Err(away(format!("HTTP {} to {method}", answer.status)));
        }
        let Listed { cursor: next, repos } = serde_json::from_slice(&answer.body)
            .map_err(|error| away(format!("the answer to {method} cannot be read: {error}")))?;
        let next = next.filter(|next| !next.is_empty());
        if next.as_ref().is_some_and(|next| next.len() > MAX_TEXT || Some(next.as_str()) == cursor) {
            return Err(away(format!("the cursor that {method} returned cannot be used")));
        }
        let repos =
            repos.into_iter().filter(|repo| repo.did.starts_with("did:") && repo.did.len() <= MAX_TEXT);
        let account = |Repo { did, rev, active, status }: Repo| Account {
            did,
            rev,
            active: active != Some(false),
            status: status.filter(|status| status.len() <= MAX_STATUS),
        };
        Ok(Page { accounts: repos.map(account).collect(), cursor: next })
    }
}
