//! The only place that knows PostgreSQL: connections, the apply call, the flush, migrations, and what an error means.

pub mod audit;
mod known;
pub mod migrate;
pub mod tombstones;
mod types;
pub mod verdict;

use std::sync::Arc;
use std::time::{Duration, Instant};

use deadpool_postgres::{
    Hook, HookError, Manager, ManagerConfig, Object, Pool, PoolError, RecyclingMethod, Runtime, Timeouts,
};
use futures_util::future::join_all;
use tokio_postgres::Error;
use tokio_postgres_rustls::MakeRustlsConnect;

use crate::config::Config;
use crate::crash::{self, Point};
use crate::event::{Event, Kind, Reason, Reject};
use crate::metrics;
use known::KnownAccounts;
use types::Call;
use verdict::{Verdict, describe, judge};

const APPLY: &str = "SELECT standpipe.apply($1, $2, $3, $4, $5)";

/// A role named standpipe has our own schema of that name first on its default search path ("$user", public): the
/// application's tables are elsewhere.
const SEARCH_PATH: &str = "SELECT set_config('search_path', coalesce(
    (SELECT string_agg(quote_ident(s), ', ') FROM unnest(current_schemas(false)) s WHERE s <> 'standpipe'),
    'public'), false)";

/// The bounded pool.
#[derive(Clone)]
pub struct Store {
    pool: Pool,
    known: Arc<KnownAccounts>,
}

/// What applying an event came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Committed: operations by kind, and how many of them changed something; the others met something newer.
    Applied(Vec<(Kind, u32, u32)>),
    /// The database refuses some of its operations, by their index, and would apply the others.
    Rejected(Vec<(usize, Reject)>),
}

/// Why a call to the store did not do its work.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct StoreError {
    /// What to do about it.
    pub verdict: Verdict,
    /// What happened, without secrets.
    pub message: String,
}

impl From<&Error> for StoreError {
    fn from(error: &Error) -> Self {
        Self { verdict: judge(error), message: describe(error) }
    }
}

impl From<Error> for StoreError {
    fn from(error: Error) -> Self {
        Self::from(&error)
    }
}

impl From<PoolError> for StoreError {
    fn from(error: PoolError) -> Self {
        match error {
            PoolError::Backend(error) => Self::from(&error),
            PoolError::Timeout(kind) => Self {
                verdict: Verdict::Retry,
                message: format!(
                    "no connection within the time allowed ({kind:?}): DB_POOL_SIZE may be too small"
                ),
            },
            other => Self { verdict: Verdict::Reconnect, message: other.to_string() },
        }
    }
}

impl Store {
    /// A pool of at most `DB_POOL_SIZE` connections; none is opened yet.
    ///
    /// # Errors
    ///
    /// `DATABASE_URL` cannot be parsed.
    pub fn new(config: &Config) -> anyhow::Result<Self> {
        let url = config.database_url.as_ref().ok_or_else(|| anyhow::anyhow!("DATABASE_URL is not set"))?;
        let statement_timeout = config.db_statement_timeout.as_millis();
        let options = connect_options(url.expose(), statement_timeout)?;
        let manager = Manager::from_config(
            options,
            tls(),
            ManagerConfig {
                // A connection in doubt is never given back, so that nothing has to be asked of one that is.
                recycling_method: RecyclingMethod::Fast,
            },
        );
        let pool = Pool::builder(manager)
            .max_size(config.db_pool_size)
            .post_create(Hook::async_fn(|client, _| {
                Box::pin(async move { client.batch_execute(SEARCH_PATH).await.map_err(HookError::Backend) })
            }))
            .runtime(Runtime::Tokio1)
            .timeouts(Timeouts {
                wait: Some(Duration::from_secs(10)),
                create: Some(Duration::from_secs(10)),
                recycle: Some(Duration::from_secs(5)),
            })
            .build()?;
        Ok(Self { pool, known: Arc::default() })
    }

    /// A connection out of the pool.
    ///
    /// # Errors
    ///
    /// The server cannot be reached or refuses, or all connections are in use.
    pub async fn session(&self) -> Result<Session, StoreError> {
        let asked = Instant::now();
        let client = self.pool.get().await?;
        ::metrics::histogram!(metrics::POOL_WAIT).record(asked.elapsed().as_secs_f64());
        Ok(Session { client, known: Arc::clone(&self.known) })
    }

    /// Whether the server answers, within `limit`.
    ///
    /// # Errors
    ///
    /// It does not.
    pub async fn ping(&self, limit: Duration) -> Result<(), StoreError> {
        let ask = async {
            let session = self.session().await?;
            session.client.simple_query("SELECT 1").await?;
            Ok(())
        };
        tokio::time::timeout(limit, ask).await.unwrap_or_else(|_| {
            Err(StoreError { verdict: Verdict::Reconnect, message: format!("no answer within {limit:?}") })
        })
    }

    /// Connections that exist, and those in use.
    #[must_use]
    pub fn pool_status(&self) -> (usize, usize) {
        let status = self.pool.status();
        (status.size, status.size.saturating_sub(status.available))
    }

    /// Closes every connection.
    pub fn close(&self) {
        self.pool.close();
    }
}

/// One connection, held for one batch: what is applied on it is flushed on it.
pub struct Session {
    client: Object,
    known: Arc<KnownAccounts>,
}

impl Session {
    /// The driver's client.
    #[must_use]
    pub fn client(&self) -> &tokio_postgres::Client {
        &self.client
    }

    /// The driver's client, for transactions of one's own.
    pub fn client_mut(&mut self) -> &mut tokio_postgres::Client {
        &mut self.client
    }

    /// Takes the connection out of the pool and closes it. For every connection that an error left in doubt.
    pub fn discard(self) {
        self.known.clear();
        drop(Object::take(self.client));
    }

    /// Applies events, each in a transaction of its own, all sent at once. The results stand in the order of the events.
    ///
    /// Nothing is durable before [`Session::flush`] has answered on this same connection.
    pub async fn apply(&self, events: &[&Event<'_>]) -> Vec<Result<Outcome, StoreError>> {
        let statement = match self.client.prepare_cached(APPLY).await {
            Ok(statement) => statement,
            Err(error) => return vec![Err(StoreError::from(&error)); events.len().max(1)],
        };
        let calls: Vec<Call<'_>> =
            events.iter().map(|event| Call::new(event, &self.known, |_| true)).collect();
        let parameters: Vec<_> = calls.iter().map(Call::parameters).collect();
        if crash::is_due(Point::InTransaction)
            && self.client.batch_execute("BEGIN").await.is_ok()
            && self.client.query_one(&statement, &parameters[0]).await.is_ok()
        {
            crash::now(Point::InTransaction);
        }
        let answers = join_all(parameters.iter().map(|p| self.client.query_one(&statement, p))).await;
        let mut results = Vec::with_capacity(events.len());
        for (event, answer) in events.iter().zip(answers) {
            results.push(match answer {
                Ok(row) => Ok(outcome(event, &row.get::<_, Vec<bool>>(0))),
                Err(error) if judge(&error) == Verdict::Reject => self.isolate(event, &error).await,
                Err(error) => Err(StoreError::from(&error)),
            });
        }
        results
    }

    /// Finds the operations that the database refuses, each tried alone in a transaction that is rolled back.
    async fn isolate(&self, event: &Event<'_>, error: &Error) -> Result<Outcome, StoreError> {
        let whole = || Reject {
            reason: Reason::Database,
            message: describe(error),
            sqlstate: error.code().map(|code| code.code().to_owned()),
        };
        // Without operations it is the event itself, whose index is one past them.
        if event.ops.len() <= 1 {
            return Ok(Outcome::Rejected(vec![(0, whole())]));
        }
        let statement = self.client.prepare_cached(APPLY).await?;
        let mut bad = Vec::new();
        for index in 0..event.ops.len() {
            let call = Call::new(event, &self.known, |other| other == index);
            self.client.batch_execute("BEGIN").await?;
            let tried = self.client.query_one(&statement, &call.parameters()).await;
            self.client.batch_execute("ROLLBACK").await?;
            match tried {
                Ok(_) => {}
                Err(error) if judge(&error) == Verdict::Reject => bad.push((
                    index,
                    Reject {
                        reason: Reason::Database,
                        message: describe(&error),
                        sqlstate: error.code().map(|code| code.code().to_owned()),
                    },
                )),
                Err(error) => return Err(StoreError::from(&error)),
            }
        }
        if bad.is_empty() {
            // Each one passes alone, together they do not: none can be singled out.
            bad = (0..event.ops.len()).map(|index| (index, whole())).collect();
        }
        Ok(Outcome::Rejected(bad))
    }

    /// Makes everything that was committed on this connection durable, `events` among it.
    ///
    /// The transactions themselves commit without waiting for the disk. This one waits, and the log is written in
    /// order: when it has answered, all of them are on disk. It must write something of its own: a transaction
    /// that writes nothing flushes nothing.
    ///
    /// # Errors
    ///
    /// The flush has not answered: everything since the last one counts as not applied.
    pub async fn flush(&self, events: &[&Event<'_>]) -> Result<(), StoreError> {
        let statement = self
            .client
            .prepare_cached(
                "SELECT set_config('synchronous_commit', CASE current_setting('synchronous_commit')
                            WHEN 'remote_apply' THEN 'remote_apply' ELSE 'on' END, true),
                        pg_logical_emit_message(true, 'standpipe', '')",
            )
            .await?;
        self.client.query_one(&statement, &[]).await?;
        for event in events {
            for did in std::iter::once(&event.repo).chain(&event.mentions) {
                if !self.known.contains(did) {
                    self.known.insert(did);
                }
            }
        }
        Ok(())
    }
}

/// Adds up what the function says of each operation.
fn outcome(event: &Event<'_>, changed: &[bool]) -> Outcome {
    let mut kinds: Vec<(Kind, u32, u32)> = Vec::with_capacity(1);
    for (op, changed) in event.ops.iter().zip(changed) {
        match kinds.last_mut() {
            Some((kind, total, applied)) if *kind == op.kind => {
                *total += 1;
                *applied += u32::from(*changed);
            }
            _ => kinds.push((op.kind, 1, u32::from(*changed))),
        }
    }
    Outcome::Applied(kinds)
}

/// The driver's options from the operator's URL.
fn connect_options(url: &str, statement_timeout: u128) -> anyhow::Result<tokio_postgres::Config> {
    // The driver knows three of libpq's six words. With rustls the certificate is always verified.
    let mut url = url.to_owned();
    for (theirs, ours) in [
        ("sslmode=verify-full", "sslmode=require"),
        ("sslmode=verify-ca", "sslmode=require"),
        ("sslmode=allow", "sslmode=prefer"),
    ] {
        url = url.replace(theirs, ours);
    }
    // The parser's error may quote what it could not read, a password among it.
    let mut options: tokio_postgres::Config = url.parse().map_err(|_| {
        anyhow::anyhow!("DATABASE_URL is not a connection string that the driver understands")
    })?;
    // Plans are made once and kept (generic); on young tables without statistics the planner would choose sequential
    // scans and hash joins and keep them too, when every access here is by key.
    let ours = format!(
        "-c statement_timeout={statement_timeout} -c lock_timeout=10000 \
         -c idle_in_transaction_session_timeout=60000 -c jit=off \
         -c plan_cache_mode=force_generic_plan -c enable_seqscan=off -c enable_hashjoin=off -c enable_mergejoin=off"
    );
    let all = match options.get_options() {
        Some(theirs) => format!("{ours} {theirs}"),
        None => ours,
    };
    options
        .options(all)
        .application_name("standpipe")
        .connect_timeout(Duration::from_secs(5))
        .tcp_user_timeout(Duration::from_secs(20))
        .keepalives_idle(Duration::from_secs(15))
        .keepalives_interval(Duration::from_secs(5))
        .keepalives_retries(3);
    Ok(options)
}

/// The machine's own certificates, so that a private authority that it trusts is trusted; else Mozilla's.
fn tls() -> MakeRustlsConnect {
    match MakeRustlsConnect::with_native_certs() {
        Ok((connect, _)) => connect,
        Err(_) => MakeRustlsConnect::with_webpki_roots(),
    }
}
