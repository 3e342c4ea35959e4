//! The directory of did:plc and the accounts' server, both at the relay's own address; and a second server, at another port,
//! to which accounts move and from which they return.
//!
//! They show the network as far as any consumer has been sent it. Repositories are made when somebody first asks for one,
//! from a second copy of the network that then follows.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use axum::body::Body;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, Response, StatusCode, header};
use serde_json::{Value, json};

use super::accounts::{Accounts, Status};
use super::key::{Key, Published};
use super::network::Network;
use super::serve::Counters;
use super::{NetworkOptions, serve};

/// Repositories in an answer of listRepos.
const PAGE: u32 = 500;

/// What is known about the accounts of a network that signs.
pub(super) struct Server {
    seed: u64,
    /// Their numbers.
    accounts: HashMap<String, u32>,
    pub(super) published: Arc<Published>,
    counters: Arc<Counters>,
    /// The port of the second server.
    second: u16,
    /// The network with its repositories, as far as it has followed.
    network: Mutex<Network>,
}

/// An answer that says why not.
struct Refusal(StatusCode, &'static str);

impl Server {
    /// None if the accounts have no keys.
    pub(super) fn new(options: &NetworkOptions, counters: Arc<Counters>, second: u16) -> Option<Self> {
        if !options.signed {
            return None;
        }
        let names = Accounts::new(options.seed);
        let accounts = (0..options.accounts.max(1)).map(|number| (names.did(number), number)).collect();
        let published = Arc::new(Published::default());
        let network = Network::with_records(options).publishing(Arc::clone(&published));
        Some(Self { seed: options.seed, accounts, published, counters, second, network: Mutex::new(network) })
    }

    /// The account's document; its server is the one that was asked, or the second one on the same host.
    fn document(&self, did: &str, asked: &str) -> Option<Value> {
        let account = *self.accounts.get(did)?;
        let host = if self.published.has_moved(account) {
            format!("{}:{}", asked.rsplit_once(':').map_or(asked, |(host, _)| host), self.second)
        } else {
            asked.to_owned()
        };
        let key = Key::of(self.seed, account, self.published.changes(account));
        Some(json!({
            "id": did,
            "alsoKnownAs": [],
            "verificationMethod": [{
                "id": format!("{did}#atproto"),
                "type": "Multikey",
                "controller": did,
                "publicKeyMultibase": key.multikey(),
            }],
            "service": [{
                "id": "#atproto_pds",
                "type": "AtprotoPersonalDataServer",
                "serviceEndpoint": format!("http://{host}"),
            }],
        }))
    }

    /// Does something with the network as it is now.
    fn now<T>(&self, look: impl FnOnce(&mut Network) -> T) -> T {
        let sent = self.counters.last_seq_sent.load(std::sync::atomic::Ordering::Relaxed);
        let mut network = self.network.lock().unwrap_or_else(PoisonError::into_inner);
        network.seek(sent + 1);
        look(&mut network)
    }

    /// Whether the server at this host is not the account's, or no longer.
    fn is_elsewhere(&self, account: u32, asked: &str) -> bool {
        let is_second = asked.ends_with(&format!(":{}", self.second));
        is_second != self.published.has_moved(account)
    }

    fn repository(&self, did: &str, asked: &str) -> Result<Vec<u8>, Refusal> {
        let not_found = Refusal(StatusCode::BAD_REQUEST, "RepoNotFound");
        let Some(account) = self.accounts.get(did) else { return Err(not_found) };
        if self.is_elsewhere(*account, asked) {
            // What a server says of an account that has left.
            return Err(Refusal(StatusCode::BAD_REQUEST, "RepoDeactivated"));
        }
        self.now(|network| {
            let Some((repositories, accounts)) = network.repositories() else { return Err(not_found) };
            match status(accounts, *account) {
                None | Some(Status::Deleted) => return Err(not_found),
                Some(Status::Active) => {}
                Some(Status::Takendown) => return Err(Refusal(StatusCode::BAD_REQUEST, "RepoTakendown")),
                Some(Status::Suspended) => return Err(Refusal(StatusCode::BAD_REQUEST, "RepoSuspended")),
                Some(Status::Deactivated) => return Err(Refusal(StatusCode::BAD_REQUEST, "RepoDeactivated")),
            }
            repositories.archive(*account, did).ok_or(not_found)
        })
    }

    fn status(&self, did: &str) -> Option<Value> {
        let account = *self.accounts.get(did)?;
        self.now(|network| {
            let (repositories, accounts) = network.repositories()?;
            let status = status(accounts, account)?;
            let rev = repositories.head(account, did).map(|(rev, _)| rev);
            Some(json!({ "did": did, "active": status == Status::Active, "status": status.name(), "rev": rev }))
        })
    }

    /// The repositories from this account number on.
    fn list(&self, from: u32, limit: u32) -> Value {
        self.now(|network| {
            let Some((repositories, accounts)) = network.repositories() else {
                return json!({ "repos": [] });
            };
            let end = from.saturating_add(limit.clamp(1, PAGE)).min(accounts.len());
            let mut repos = Vec::new();
            for account in from..end {
                let did = accounts.did(account);
                let status = accounts.get(account).status;
                if let Some((rev, head)) = repositories.head(account, &did) {
                    let active = status == Status::Active;
                    let mut repo =
                        json!({ "did": did, "head": head.to_string(), "rev": rev, "active": active });
                    if let Some(name) = status.name() {
                        repo["status"] = json!(name);
                    }
                    repos.push(repo);
                }
            }
            let mut page = json!({ "repos": repos });
            if end < accounts.len() {
                page["cursor"] = json!(end.to_string());
            }
            page
        })
    }
}

fn status(accounts: &Accounts, account: u32) -> Option<Status> {
    (account < accounts.len()).then(|| accounts.get(account).status)
}

fn answer(status: StatusCode, value: &Value) -> Response<Body> {
    let mut response = Response::new(Body::from(value.to_string()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
    response
}

fn refuse(Refusal(status, error): Refusal) -> Response<Body> {
    answer(status, &json!({ "error": error, "message": error }))
}

type Served = State<Arc<serve::Shared>>;
type Parameters = Query<HashMap<String, String>>;

/// Asks the server, which may have to catch up with the network first.
async fn ask<T: Send + 'static>(
    shared: Arc<serve::Shared>,
    question: impl FnOnce(&Server) -> T + Send + 'static,
) -> Result<T, Refusal> {
    let asked = tokio::task::spawn_blocking(move || shared.server.as_ref().map(question)).await;
    asked.ok().flatten().ok_or(Refusal(StatusCode::NOT_FOUND, "NotFound"))
}

/// The host that was asked.
fn host(headers: &HeaderMap) -> &str {
    headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default()
}

pub(super) async fn document(
    State(shared): Served,
    Path(did): Path<String>,
    headers: HeaderMap,
) -> Response<Body> {
    match shared.server.as_ref().and_then(|server| server.document(&did, host(&headers))) {
        Some(document) => answer(StatusCode::OK, &document),
        None => refuse(Refusal(StatusCode::NOT_FOUND, "NotFound")),
    }
}

pub(super) async fn repository(
    State(shared): Served,
    Query(query): Parameters,
    headers: HeaderMap,
) -> Response<Body> {
    shared.counters.repositories_sent.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let did = query.get("did").cloned().unwrap_or_default();
    match ask(shared, move |server| server.repository(&did, host(&headers))).await.flatten() {
        Ok(archive) => {
            let mut response = Response::new(Body::from(archive));
            let car = header::HeaderValue::from_static("application/vnd.ipld.car");
            response.headers_mut().insert(header::CONTENT_TYPE, car);
            response
        }
        Err(refusal) => refuse(refusal),
    }
}

pub(super) async fn repository_status(State(shared): Served, Query(query): Parameters) -> Response<Body> {
    let did = query.get("did").cloned().unwrap_or_default();
    match ask(shared, move |server| server.status(&did)).await {
        Ok(Some(status)) => answer(StatusCode::OK, &status),
        Ok(None) => refuse(Refusal(StatusCode::BAD_REQUEST, "RepoNotFound")),
        Err(refusal) => refuse(refusal),
    }
}

pub(super) async fn repositories(State(shared): Served, Query(query): Parameters) -> Response<Body> {
    let number = |name: &str, default| match query.get(name).map(|text| text.parse::<u32>()) {
        None => Ok(default),
        Some(number) => number.map_err(|_| Refusal(StatusCode::BAD_REQUEST, "InvalidRequest")),
    };
    let (from, limit) = match (number("cursor", 0), number("limit", PAGE)) {
        (Ok(from), Ok(limit)) => (from, limit),
        (Err(refusal), _) | (_, Err(refusal)) => return refuse(refusal),
    };
    match ask(shared, move |server| server.list(from, limit)).await {
        Ok(page) => answer(StatusCode::OK, &page),
        Err(refusal) => refuse(refusal),
    }
}
