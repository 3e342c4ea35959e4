//! The only place that knows PostgreSQL: connections, the apply call, the flush, migrations and the meaning of errors.

pub mod acknowledged;
pub mod audit;
pub mod backfills;
mod batch;
mod bulk;
mod call;
mod error;
mod forbidding;
pub mod handlers;
mod known;
pub mod migrate;
pub mod partition;
mod plan;
pub mod purge;
pub mod repos;
mod session;
pub mod settings;
pub mod statements;
pub mod takeover;
pub mod tls;
pub mod tombstones;
pub mod verdict;

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use deadpool_postgres::{Hook, Manager, ManagerConfig, Object, Pool, RecyclingMethod, Runtime, Timeouts};

use crate::config::{Config, DatabaseUrl};
use crate::metrics;
use error::hook_error;
use known::KnownAccounts;
use session::{Cancel, Lent};
use verdict::Verdict;

pub use batch::{Counts, Fate};
pub use error::StoreError;
pub use session::Session;
pub use tokio_postgres::{Client, Row};

/// The server ends a statement at its own limit; an answer that takes this much longer will never arrive. Without this
/// limit, we would wait forever on a connection whose peer is gone but still acknowledged, for example by a proxy.
const ANSWER_MARGIN: Duration = Duration::from_secs(5);

/// The bounded pool.
#[derive(Clone)]
pub struct Store {
    pool: Pool,
    known: Arc<KnownAccounts>,
    answer_limit: Duration,
    /// Cancels the work of a discarded connection.
    cancel: Arc<Cancel>,
}

impl Store {
    /// A pool of at most `DB_POOL_SIZE` connections; none is opened yet.
    ///
    /// # Errors
    ///
    /// `DATABASE_URL` cannot be parsed.
    pub fn new(config: &Config) -> anyhow::Result<Self> {
        Self::with(config, config.db_pool_size, settings::of, config.db_statement_timeout)
    }

    fn with(
        config: &Config,
        size: usize,
        settings: impl FnOnce(&Config, &DatabaseUrl) -> String,
        timeout: Duration,
    ) -> anyhow::Result<Self> {
        let url = config.database_url.as_ref().ok_or_else(|| anyhow::anyhow!("DATABASE_URL is not set"))?;
        let options = connect_options(&url.for_driver())?;
        let settings: Arc<str> = settings(config, url).into();
        let connector = tls::connector(config)?;
        let cancel = Arc::new(Cancel::new(connector.clone()));
        let manager = Manager::from_config(
            options,
            connector,
            ManagerConfig {
                // Connections in doubt are never returned to the pool, so a returned one needs no check.
                recycling_method: RecyclingMethod::Fast,
            },
        );
        let pool = Pool::builder(manager)
            .max_size(size)
            .post_create(Hook::async_fn(move |client, _| {
                let settings = Arc::clone(&settings);
                Box::pin(async move {
                    settings::apply(client, &settings).await.map_err(|error| hook_error(&error))
                })
            }))
            .runtime(Runtime::Tokio1)
            .timeouts(Timeouts {
                wait: Some(Duration::from_secs(10)),
                create: Some(Duration::from_secs(10)),
                recycle: Some(Duration::from_secs(5)),
            })
            .build()?;
        Ok(Self { pool, known: Arc::default(), answer_limit: timeout + ANSWER_MARGIN, cancel })
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
        let uses = Object::metrics(&client).recycle_count;
        let session = Session {
            client: Lent {
                object: Some(client),
                unanswered: AtomicUsize::new(0),
                discarded: false,
                cancel: Arc::clone(&self.cancel),
            },
            known: Arc::clone(&self.known),
            answer_limit: self.answer_limit,
        };
        if uses >= 8 && uses.is_power_of_two() {
            // Plans are kept, and one made while a table was empty is often wrong a second later.
            session.in_time(session.client.batch_execute("DISCARD PLANS")).await?;
        }
        Ok(session)
    }

    /// Whether the server answers, within `limit`.
    ///
    /// # Errors
    ///
    /// It does not.
    pub async fn ping(&self, limit: Duration) -> Result<(), StoreError> {
        let late = |_| StoreError::new(Verdict::Reconnect, format!("no answer within {limit:?}"));
        let session = tokio::time::timeout(limit, self.session()).await.map_err(late)??;
        match tokio::time::timeout(limit, session.client.simple_query("SELECT 1")).await {
            Ok(answer) => Ok(answer.map(drop)?),
            Err(elapsed) => {
                // In the pool, the outstanding answer would hold up the next user.
                session.give_up();
                Err(late(elapsed))
            }
        }
    }

    /// The number of connections that exist, and of those in use.
    #[must_use]
    pub fn pool_status(&self) -> (usize, usize) {
        let status = self.pool.status();
        (status.size, status.size.saturating_sub(status.available))
    }

    /// Refuses a pooler on the way that gives each transaction a different server process, where our session state
    /// would be lost.
    ///
    /// # Errors
    ///
    /// There is such a pooler, with [`Verdict::Halt`]; or the server cannot be reached.
    pub async fn refuse_transaction_pooling(&self) -> Result<(), StoreError> {
        if self.pool.status().max_size < 2 {
            return Ok(());
        }
        let (one, other) = (self.session().await?, self.session().await?);
        let limit = Duration::from_secs(10);
        let asked = settings::refuse_transaction_pooling(one.client(), other.client());
        let late = |_| StoreError::new(Verdict::Reconnect, format!("no answer within {limit:?}"));
        let answer = tokio::time::timeout(limit, asked).await.map_err(late).flatten();
        if answer.is_err() {
            one.give_up();
            other.give_up();
        }
        answer
    }

    /// Closes every connection, cancelling whatever the server is still doing for it: the server would not notice that
    /// we are gone.
    pub async fn close(&self) {
        self.pool.close();
        self.cancel.ended().await;
    }
}

/// The driver's options from the operator's URL. Our own settings are not among them, because poolers refuse or drop
/// unknown options: they are made on the connection (settings.rs).
fn connect_options(url: &str) -> anyhow::Result<tokio_postgres::Config> {
    // The parser's error may quote the text that it could not parse, including a password.
    let mut options: tokio_postgres::Config = url.parse().map_err(|_| {
        anyhow::anyhow!("DATABASE_URL is not a connection string that the driver understands")
    })?;
    options
        .application_name("standpipe")
        .connect_timeout(Duration::from_secs(5))
        .tcp_user_timeout(Duration::from_secs(20))
        .keepalives_idle(Duration::from_secs(15))
        .keepalives_interval(Duration::from_secs(5))
        .keepalives_retries(3);
    Ok(options)
}
