//! One step of a change to a database that others are working on: short, and retried when it cannot get its lock.

use std::fmt;
use std::time::{Duration, Instant};

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::super::StoreError;
use crate::crash::{self, Point};

/// How long a step waits for a lock. All other statements on the table queue up behind a request for an exclusive lock,
/// so this is how long we hold them up if somebody keeps the table locked.
const LOCK_TIMEOUT: &str = "250ms";
/// Pause between two attempts, so that others make progress.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(3);
/// After this long, the step reports what it is waiting for.
const SAY_AFTER: Duration = Duration::from_secs(3);

/// Receives progress reports.
pub type Say<'a> = dyn FnMut(&str) + Send + 'a;

/// A change that is complete in itself.
#[derive(Clone, Debug)]
pub struct Step {
    /// What it does, for a person.
    pub what: String,
    /// The locks it holds.
    pub lock: Lock,
    pub runs: Vec<Run>,
}

/// The locks of a step, by their effect on others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Lock {
    /// No lock on others' tables.
    None,
    /// A change of the catalogue under ACCESS EXCLUSIVE.
    Moment(String),
    /// SHARE UPDATE EXCLUSIVE: only other changes of the table wait.
    Beside(String),
    /// The first, then the second.
    BesideThenMoment(String),
    /// Locks only the rows that it removes.
    Rows(String),
}

impl fmt::Display for Lock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let moment = format!("waits at most {LOCK_TIMEOUT}, then tries again");
        match self {
            Lock::None => f.write_str("takes no locks on your tables"),
            Lock::Moment(table) => write!(f, "ACCESS EXCLUSIVE on {table} for a moment; {moment}"),
            Lock::Beside(table) => write!(f, "SHARE UPDATE EXCLUSIVE on {table}: reads and writes continue"),
            Lock::BesideThenMoment(table) => write!(
                f,
                "SHARE UPDATE EXCLUSIVE on {table}: reads and writes continue; then ACCESS EXCLUSIVE for a moment; \
                {moment}"
            ),
            Lock::Rows(table) => write!(f, "locks the rows of {table} that it removes"),
        }
    }
}

/// SQL that runs as a unit.
#[derive(Clone, Debug)]
pub enum Run {
    /// Statements that form one transaction.
    Transaction(String),
    /// One statement that must run outside a transaction: CONCURRENTLY.
    Alone(String),
}

/// Prepares the session for steps.
pub async fn begin(client: &Client) -> Result<(), StoreError> {
    Ok(client
        .batch_execute(&format!("SET statement_timeout = 0; SET lock_timeout = '{LOCK_TIMEOUT}'"))
        .await?)
}

/// Restores the session's settings.
pub async fn end(client: &Client) -> Result<(), StoreError> {
    Ok(client.batch_execute("RESET statement_timeout; RESET lock_timeout").await?)
}

impl Step {
    /// Runs the step, however long others keep the locks.
    pub async fn run(&self, client: &Client, say: &mut Say<'_>) -> Result<(), StoreError> {
        for run in &self.runs {
            run.run(client, &self.what, say).await?;
        }
        Ok(())
    }
}

impl Run {
    pub async fn run(&self, client: &Client, what: &str, say: &mut Say<'_>) -> Result<(), StoreError> {
        let began = Instant::now();
        let mut said = began;
        let mut pause = FIRST_PAUSE;
        loop {
            let Err(error) = self.once(client, what, say).await else { return Ok(()) };
            if !matches!(
                error.code(),
                Some(
                    &SqlState::LOCK_NOT_AVAILABLE
                        | &SqlState::T_R_DEADLOCK_DETECTED
                        | &SqlState::T_R_SERIALIZATION_FAILURE
                )
            ) {
                return Err(error.into());
            }
            if said.elapsed() > SAY_AFTER {
                said = Instant::now();
                let holders = holders(client).await?;
                say(&format!(
                    "  {what}: waiting for its lock for {:.0} s{holders}",
                    began.elapsed().as_secs_f64()
                ));
            }
            tokio::time::sleep(pause.mul_f64(0.5 + fastrand::f64())).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    async fn once(
        &self,
        client: &Client,
        what: &str,
        say: &mut Say<'_>,
    ) -> Result<(), tokio_postgres::Error> {
        match self {
            Run::Transaction(sql) => {
                if crash::is_due(Point::InMigration) {
                    while client.batch_execute(&format!("BEGIN; {sql}")).await.is_err() {
                        client.batch_execute("ROLLBACK").await?;
                    }
                    crash::now(Point::InMigration);
                }
                // In one message, so that the lock is not held during a round trip.
                let done = client.batch_execute(&format!("BEGIN; {sql}; COMMIT")).await;
                if done.is_err() && !client.is_closed() {
                    client.batch_execute("ROLLBACK").await?;
                }
                done
            }
            Run::Alone(sql) => {
                crash::at(Point::InMigration);
                // Its lock holds nobody up, and it has to wait for older transactions.
                client.batch_execute("SET lock_timeout = 0").await?;
                let done = with_heartbeat(client.batch_execute(sql), what, say).await;
                if !client.is_closed() {
                    client.batch_execute(&format!("SET lock_timeout = '{LOCK_TIMEOUT}'")).await?;
                }
                crash::at(Point::InMigration);
                done
            }
        }
    }
}

async fn with_heartbeat<T>(work: impl Future<Output = T>, what: &str, say: &mut Say<'_>) -> T {
    let began = Instant::now();
    tokio::pin!(work);
    loop {
        match tokio::time::timeout(3 * SAY_AFTER, &mut work).await {
            Ok(done) => return done,
            Err(_) => say(&format!(
                "  {what}: running for {:.0} s; it also waits for transactions older than itself",
                began.elapsed().as_secs_f64()
            )),
        }
    }
}

/// Transactions open on one of the tables for long enough to block the step.
async fn holders(client: &Client) -> Result<String, StoreError> {
    let rows = client.query(include_str!("../../../sql/store/lock_holders.sql"), &[]).await?;
    let names: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    Ok(if names.is_empty() { String::new() } else { format!("; possibly blocked by {}", names.join(", ")) })
}
