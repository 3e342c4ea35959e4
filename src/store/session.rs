//! A connection from the pool, and how it is returned or closed.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use deadpool_postgres::Object;
use tokio::sync::watch;
use tokio_postgres::{Client, Error};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::StoreError;
use super::known::KnownAccounts;
use super::verdict::Verdict;
use crate::event::Event;

/// Time limit for the server to end a cancelled statement.
const CANCEL: Duration = Duration::from_secs(5);
const FLUSH: &str = include_str!("../../sql/store/flush.sql");

/// One connection, held for one batch: events are flushed on the connection that applied them.
pub struct Session {
    pub(super) client: Lent,
    pub(super) known: Arc<KnownAccounts>,
    pub(super) answer_limit: Duration,
}

impl Session {
    /// The driver's client.
    #[must_use]
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// The driver's client, for the caller's own transactions.
    pub fn client_mut(&mut self) -> &mut Client {
        &mut self.client
    }

    /// Removes the connection from the pool and closes it. For every connection that an error left in doubt.
    ///
    /// Its running statement is cancelled first, and the connection keeps its place in the pool until then: a server
    /// process that is waiting, for example for a standby, does not notice that its client is gone, and each attempt
    /// would add one.
    pub fn discard(mut self) {
        self.known.clear();
        self.client.discarded = true;
    }

    /// Like [`Session::discard`], for a connection with an outstanding answer.
    pub fn give_up(self) {
        self.client.unanswered.fetch_add(1, Ordering::Relaxed);
        self.discard();
    }

    /// Makes everything committed on this connection durable, including `events`.
    ///
    /// The transactions themselves commit without waiting for the disk. This one waits, and the log is written in
    /// order: when it has answered, all of them are on disk. It must write something itself: a transaction that writes
    /// nothing flushes nothing.
    ///
    /// # Errors
    ///
    /// The flush has not answered: everything since the last one counts as not applied.
    pub async fn flush(&self, events: &[&Event<'_>]) -> Result<(), StoreError> {
        let statement = self.in_time(self.client.prepare_cached(FLUSH)).await?;
        self.in_time(self.client.query_one(&statement, &[])).await?;
        let dids = events.iter().flat_map(|event| std::iter::once(&event.repo).chain(&event.mentions));
        self.known.insert(dids.map(|did| &**did));
        Ok(())
    }

    /// Waits for an answer, but not for ever.
    pub(super) async fn in_time<T>(
        &self,
        answer: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, StoreError> {
        self.client.unanswered.fetch_add(1, Ordering::Relaxed);
        match tokio::time::timeout(self.answer_limit, answer).await {
            Ok(answer) => {
                self.client.unanswered.fetch_sub(1, Ordering::Relaxed);
                Ok(answer?)
            }
            Err(_) => Err(self.no_answer()),
        }
    }

    pub(super) fn no_answer(&self) -> StoreError {
        StoreError::new(Verdict::Reconnect, format!("no answer within {:?}", self.answer_limit))
    }
}

/// A connection from the pool. It is returned unless a request on it is unanswered, whatever the reason: then it is
/// closed.
pub(super) struct Lent {
    /// Present until the drop.
    pub(super) object: Option<Object>,
    pub(super) unanswered: AtomicUsize,
    pub(super) discarded: bool,
    pub(super) cancel: Arc<Cancel>,
}

impl Deref for Lent {
    type Target = Object;

    fn deref(&self) -> &Object {
        match &self.object {
            Some(object) => object,
            None => unreachable!("only the drop takes it"),
        }
    }
}

impl DerefMut for Lent {
    fn deref_mut(&mut self) -> &mut Object {
        match &mut self.object {
            Some(object) => object,
            None => unreachable!("only the drop takes it"),
        }
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let Some(object) = self.object.take() else { return };
        if self.unanswered.load(Ordering::Relaxed) > 0 {
            self.cancel.end(object);
        } else if self.discarded {
            drop(Object::take(object));
        }
    }
}

/// Closes connections on which the server is still busy. Only those: a cancellation with nothing to cancel may hit the
/// next request, and poolers have been seen to fail on it.
pub(super) struct Cancel {
    tls: MakeRustlsConnect,
    /// The number of connections being closed.
    ending: watch::Sender<usize>,
}

impl Cancel {
    pub(super) fn new(tls: MakeRustlsConnect) -> Self {
        Self { tls, ending: watch::channel(0).0 }
    }

    /// Waits, but not for long, until the connections being closed are closed.
    pub(super) async fn ended(&self) {
        let mut ending = self.ending.subscribe();
        let _ =
            tokio::time::timeout(Duration::from_millis(1500), ending.wait_for(|ending| *ending == 0)).await;
    }

    /// Cancels the server's work for a connection, and closes it. Until then it counts as one of the pool's.
    fn end(self: &Arc<Self>, client: Object) {
        let runtime = tokio::runtime::Handle::try_current();
        let (Ok(runtime), false) = (runtime, client.is_closed()) else {
            drop(Object::take(client));
            return;
        };
        let cancel = Arc::clone(self);
        cancel.ending.send_modify(|ending| *ending += 1);
        runtime.spawn(async move {
            let cancelled = async {
                // The answer to this arrives after that to the cancelled request.
                client.cancel_token().cancel_query(cancel.tls.clone()).await.ok()?;
                client.simple_query("SELECT 1").await.ok()
            };
            let _ = tokio::time::timeout(CANCEL, cancelled).await;
            drop(Object::take(client));
            cancel.ending.send_modify(|ending| *ending -= 1);
        });
    }
}
