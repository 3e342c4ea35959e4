//! The only place that knows Redis: the entry format, appending, reading, acknowledging, trimming, dead letters.

pub mod accounts;
pub mod append;
pub mod dead_letters;
pub mod entry;
pub mod epochs;
pub mod gap;
pub mod group;
pub mod ingest;
pub mod janitor;
pub mod lease;
pub mod legacy;
pub mod noted;
pub mod output;
pub mod positions;
pub mod rights;
pub mod server;
pub mod settled;
pub mod tasks;
pub mod wanted;

use std::sync::Arc;
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::io::tcp::TcpSettings;
use redis::io::tcp::socket2::TcpKeepalive;
use redis::{AsyncConnectionConfig, ConnectionAddr, IntoConnectionInfo, RedisError, TlsCertificates};

use crate::config::{CaFile, Config};

pub use redis::RedisError as StreamError;
pub use redis::RedisResult as StreamResult;

/// How long one XREADGROUP waits for entries; also how long a stop may have to wait for a quiet pipeline.
pub const BLOCK: Duration = Duration::from_secs(1);

/// Every key that belongs to one stream.
#[derive(Clone, Debug)]
pub struct Keys {
    /// The stream.
    pub stream: String,
    /// The relay position up to which everything is in the stream.
    pub cursor: String,
    /// The relay that the cursor belongs to.
    pub relay: String,
    /// The relay position before the lowest that the group has not acknowledged: the reader goes back to it if the
    /// stream is lost.
    pub acked: String,
    /// The first entry in the current relay's numbering.
    pub start: String,
    /// State the janitor keeps between runs.
    pub watch: String,
    /// The epoch, our reader's last entry, and the newest revision that it appended; see append.lua.
    pub epoch: String,
    /// The first entry of each epoch.
    pub epochs: String,
    /// Counts of known losses, by reason.
    pub missed: String,
    /// The last gaps.
    pub gaps: String,
    /// PostgreSQL's last record of what the group acknowledged.
    pub noted: String,
    /// The reader's lease.
    pub lease: String,
    /// The lease on the consumer names that begin with our `CONSUMER_ID`.
    pub consumer_lease: String,
    /// The number of entries that we trimmed.
    pub trimmed: String,
    /// How often the stream was found deleted.
    pub lost: String,
    /// The dead letters.
    pub dead: String,
    /// The number of accounts with a head; the heads are in `<heads>:<bucket>`.
    pub heads: String,
    /// Commits whose signature is still to be checked.
    pub unchecked: String,
    /// Repositories to repair.
    pub repairs: String,
    /// Accounts whose handle is to be looked up.
    pub handles: String,
    /// The accounts that are wanted, if not all are.
    pub wanted: String,
    /// The accounts that others feed, besides the relay.
    pub fed: String,
    /// What ended as dead letters, by the entry that it was in.
    pub refused: String,
    /// The consumer group.
    pub group: String,
}

impl Keys {
    /// The keys according to the configuration.
    #[must_use]
    pub fn new(config: &Config) -> Self {
        Self {
            stream: config.stream_key.clone(),
            cursor: config.cursor_key.clone(),
            relay: config.cursor_relay_key(),
            acked: format!("{}:acked", config.cursor_key),
            start: format!("{}:start", config.cursor_key),
            watch: format!("{}:watch", config.cursor_key),
            epoch: format!("{}:epoch", config.cursor_key),
            epochs: format!("{}:epochs", config.cursor_key),
            missed: format!("{}:missed", config.stream_key),
            gaps: format!("{}:gaps", config.stream_key),
            noted: format!("{}:{}:noted", config.stream_key, config.consumer_group),
            lease: format!("{}:lease", config.cursor_key),
            consumer_lease: lease_key(&config.stream_key, &config.consumer_group, &config.consumer_id),
            trimmed: format!("{}:trimmed", config.stream_key),
            lost: format!("{}:lost", config.stream_key),
            dead: config.dead_letter_key(),
            heads: format!("{}:heads", config.stream_key),
            unchecked: format!("{}:unchecked", config.stream_key),
            repairs: format!("{}:repairs", config.stream_key),
            handles: format!("{}:handles", config.stream_key),
            wanted: format!("{}:wanted", config.stream_key),
            fed: format!("{}:fed", config.stream_key),
            refused: format!("{}:refused", config.stream_key),
            group: config.consumer_group.clone(),
        }
    }

    /// The size of the dead letters.
    #[must_use]
    pub fn dead_bytes(&self) -> String {
        format!("{}:bytes", self.dead)
    }

    /// The keys of the dead letters' subjects, so that none is kept twice.
    #[must_use]
    pub fn dead_keys(&self) -> String {
        format!("{}:keys", self.dead)
    }

    /// The number of dead letters that the reader kept per account.
    #[must_use]
    pub fn dead_accounts(&self) -> String {
        format!("{}:accounts", self.dead)
    }

    /// All keys.
    #[must_use]
    pub fn all(&self) -> Vec<String> {
        let named = [
            &self.stream,
            &self.cursor,
            &self.relay,
            &self.acked,
            &self.start,
            &self.watch,
            &self.epoch,
            &self.epochs,
            &self.missed,
            &self.gaps,
            &self.noted,
            &self.lease,
            &self.consumer_lease,
            &self.trimmed,
            &self.lost,
            &self.dead,
            &self.heads,
            &self.unchecked,
            &self.repairs,
            &self.handles,
            &self.wanted,
            &self.fed,
            &self.refused,
        ];
        named
            .into_iter()
            .cloned()
            .chain([
                self.dead_bytes(),
                self.dead_keys(),
                self.dead_accounts(),
                format!("{}:0", self.heads),
                self.tasks(),
                self.kafka("topic"),
                self.of(lease::Lease::Origin),
                format!("{}:request:name", self.stream),
                self.of(lease::Lease::Output(output::Output::Amqp)),
                self.of(lease::Lease::Output(output::Output::Kafka)),
            ])
            .collect()
    }

    /// The lease on the consumer names of a process with this `CONSUMER_ID`.
    #[must_use]
    pub fn lease_of(&self, consumer_id: &str) -> String {
        lease_key(&self.stream, &self.group, consumer_id)
    }
}

fn lease_key(stream: &str, group: &str, consumer_id: &str) -> String {
    format!("{stream}:{group}:{consumer_id}:lease")
}

/// One connection to a stream, with all its keys. Everything that reader, pipelines and tasks do in Redis is a method
/// of it, in the file for its subject.
///
/// Every user has its own: a blocking read holds up everything queued behind it. A clone shares the connection.
#[derive(Clone)]
pub struct Stream {
    connection: MultiplexedConnection,
    keys: Arc<Keys>,
}

impl Stream {
    /// Wraps an open connection.
    #[must_use]
    pub fn over(connection: MultiplexedConnection, keys: Keys) -> Self {
        Self { connection, keys: Arc::new(keys) }
    }

    /// Its keys.
    #[must_use]
    pub fn keys(&self) -> &Keys {
        &self.keys
    }
}

/// Opens connections to one stream.
#[derive(Clone)]
pub struct Redis {
    client: redis::Client,
    keys: Arc<Keys>,
}

impl Redis {
    /// Prepares to connect to `REDIS_URL`, trusting `REDIS_CA_FILE`; nothing is sent yet.
    ///
    /// # Errors
    ///
    /// The client does not understand the URL.
    pub fn open(config: &Config) -> Result<Self, RedisError> {
        let pem = config.redis_ca.as_ref().map(CaFile::pem);
        Self::with(config.redis_url.expose(), pem, Keys::new(config))
    }

    /// The stream's keys.
    #[must_use]
    pub fn keys(&self) -> &Keys {
        &self.keys
    }

    fn with(url: &str, ca: Option<&[u8]>, keys: Keys) -> Result<Self, RedisError> {
        // The defaults would wait two hours for a peer that vanished silently.
        let tcp = TcpSettings::default()
            .set_nodelay(true)
            .set_keepalive(
                TcpKeepalive::new()
                    .with_time(Duration::from_secs(15))
                    .with_interval(Duration::from_secs(5))
                    .with_retries(3),
            )
            .set_user_timeout(Duration::from_secs(20));
        let info = url.into_connection_info()?.set_tcp_settings(tcp);
        let client = match ca {
            Some(pem) if matches!(info.addr(), ConnectionAddr::TcpTls { .. }) => {
                let trusted = TlsCertificates { client_tls: None, root_cert: Some(pem.to_vec()) };
                redis::Client::build_with_tls(info, trusted)?
            }
            _ => redis::Client::open(info)?,
        };
        Ok(Self { client, keys: Arc::new(keys) })
    }

    /// Opens a connection whose answers may take a little longer than [`BLOCK`].
    ///
    /// On any error or timeout, drop it and open another: a read whose answer nobody waited for has still moved
    /// entries into our pending list.
    ///
    /// # Errors
    ///
    /// The server cannot be reached or refuses us.
    pub async fn connect(&self) -> Result<Stream, RedisError> {
        // The client's default of 500 ms would abort every blocking read, and a save to disk can take longer.
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(Duration::from_secs(5)))
            .set_response_timeout(Some(BLOCK + Duration::from_secs(9)));
        let connection = self.client.get_multiplexed_async_connection_with_config(&config).await?;
        Ok(Stream { connection, keys: Arc::clone(&self.keys) })
    }

    /// The connection that was kept from the last time, or a new one. It is the caller's to put back if it is still good.
    ///
    /// # Errors
    ///
    /// As for [`Redis::connect`].
    pub async fn reuse(&self, kept: &mut Option<Stream>) -> Result<Stream, RedisError> {
        match kept.take() {
            Some(stream) => Ok(stream),
            None => self.connect().await,
        }
    }
}

/// Whether the error reports that the group, or the stream with it, does not exist.
#[must_use]
pub fn is_nogroup(error: &RedisError) -> bool {
    // A read that was blocking while the key was deleted gets a different message.
    error.code() == Some("NOGROUP")
        || error.code() == Some("UNBLOCKED")
        || error.to_string().contains("the stream key no longer exists")
        || error.to_string().contains("no such key")
}

/// Whether the error reports that Redis has no memory left for a write.
#[must_use]
pub fn is_oom(error: &RedisError) -> bool {
    // Redis 6.2 wraps errors in scripts in a message of its own.
    error.code() == Some("OOM") || error.to_string().contains("-OOM ")
}

/// Some fields of a hash with their values, and where to continue; 0 at the end.
async fn page<T: redis::FromRedisValue>(
    connection: &mut MultiplexedConnection,
    key: &str,
    cursor: u64,
) -> StreamResult<(u64, Vec<(String, T)>)> {
    redis::cmd("HSCAN").arg(key).arg(cursor).arg("COUNT").arg(256).query_async(connection).await
}
