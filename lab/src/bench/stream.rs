//! The stream: filled once from the simulated network, and put in its place again before every run.

use anyhow::{Context as _, Result, ensure};
use redis::aio::MultiplexedConnection;

use crate::simulate::{Network, NetworkOptions};
use standpipe::config::Collections;
use standpipe::origin::relay::decode::{Message, decode};
use standpipe::stream::Keys;
use standpipe::stream::append::NewEntry;

/// Where prepared streams are kept: another database of the same server.
const SHELF: u32 = 1;
/// Entries of one pipeline of commands.
const CHUNK: usize = 1000;

/// A stream on the shelf.
#[derive(Clone, Debug)]
pub struct Prepared {
    key: String,
    /// How many entries it has.
    pub entries: u64,
    /// Bytes of an entry's data on average.
    pub entry_bytes: f64,
}

/// The traffic that everything is measured with: every kind of event.
#[must_use]
pub fn network(seed: u64, accounts: u32) -> NetworkOptions {
    NetworkOptions { seed, accounts, deletions: true, ..NetworkOptions::default() }
}

/// The same with hardly two events in a row from the same account.
#[must_use]
pub fn spread_network(seed: u64) -> NetworkOptions {
    NetworkOptions { spread: true, ..network(seed, 200_000) }
}

/// The server, connected to what is on the shelf and to what is worked on.
pub struct Streams {
    shelf: MultiplexedConnection,
    work: MultiplexedConnection,
}

impl Streams {
    /// Connects.
    ///
    /// # Errors
    ///
    /// The server cannot be reached.
    pub async fn open(url: &str) -> Result<Self> {
        let connect = async |url: String| {
            // Copying a large stream takes its time.
            let config = redis::AsyncConnectionConfig::new().set_response_timeout(None);
            redis::Client::open(url)?.get_multiplexed_async_connection_with_config(&config).await
        };
        Ok(Self {
            shelf: connect(format!("{url}/{SHELF}")).await.context("Redis")?,
            work: connect(url.to_owned()).await.context("Redis")?,
        })
    }

    /// A connection to the database that is worked on.
    #[must_use]
    pub fn connection(&self) -> MultiplexedConnection {
        self.work.clone()
    }

    /// Fills a stream with this many entries, as the reader would.
    ///
    /// # Errors
    ///
    /// The server refuses.
    pub async fn prepare(
        &mut self,
        key: &str,
        options: &NetworkOptions,
        collections: &Collections,
        entries: u64,
    ) -> Result<Prepared> {
        let mut entries_of = entries_of(options, collections).take(entries as usize);
        let (mut count, mut bytes) = (0, 0);
        loop {
            let chunk: Vec<NewEntry> =
                tokio::task::block_in_place(|| entries_of.by_ref().take(CHUNK).collect());
            if chunk.is_empty() {
                break;
            }
            let mut pipe = redis::pipe();
            for entry in &chunk {
                add(&mut pipe, key, entry);
                bytes += entry.data.len();
            }
            count += chunk.len() as u64;
            pipe.exec_async(&mut self.shelf).await?;
        }
        Ok(Prepared { key: key.to_owned(), entries: count, entry_bytes: bytes as f64 / count.max(1) as f64 })
    }

    /// Leaves nothing in the database that is worked on.
    ///
    /// # Errors
    ///
    /// The server refuses.
    pub async fn clear(&mut self) -> Result<()> {
        redis::cmd("FLUSHDB").arg("SYNC").exec_async(&mut self.work).await?;
        Ok(())
    }

    /// Leaves nothing but a copy of a prepared stream, which no group has read.
    ///
    /// # Errors
    ///
    /// The server refuses.
    pub async fn restore(&mut self, prepared: &Prepared, keys: &Keys) -> Result<()> {
        self.clear().await?;
        let copied: u64 = redis::cmd("COPY")
            .arg(&prepared.key)
            .arg(&keys.stream)
            .arg("DB")
            .arg(0)
            .query_async(&mut self.shelf)
            .await?;
        ensure!(copied == 1, "the prepared stream is gone");
        Ok(())
    }

    /// Takes a stream from the shelf for good.
    ///
    /// # Errors
    ///
    /// The server refuses.
    pub async fn forget(&mut self, prepared: Prepared) -> Result<()> {
        redis::cmd("UNLINK").arg(prepared.key).exec_async(&mut self.shelf).await?;
        Ok(())
    }

    /// The server's version.
    ///
    /// # Errors
    ///
    /// The server refuses.
    pub async fn version(&mut self) -> Result<String> {
        let info: String = redis::cmd("INFO").arg("server").query_async(&mut self.work).await?;
        let field = |name: &str| info.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        // Valkey says what version of Redis it is like, and its own.
        Ok(match (field("valkey_version:"), field("redis_version:")) {
            (Some(version), _) => format!("Valkey {version}"),
            (None, version) => format!("Redis {}", version.unwrap_or("unknown")),
        })
    }
}

/// Adds an XADD as the reader's script has it.
pub fn add(pipe: &mut redis::Pipeline, key: &str, entry: &NewEntry) {
    pipe.cmd("XADD")
        .arg(key)
        .arg("*")
        .arg("type")
        .arg(entry.event_type)
        .arg("data")
        .arg(&entry.data)
        .arg("seq")
        .arg(entry.seq);
}

/// What the reader makes of the network's frames, without end.
pub fn entries_of(options: &NetworkOptions, collections: &Collections) -> impl Iterator<Item = NewEntry> {
    Network::new(options).flat_map(|frame| match decode(&frame.bytes, collections) {
        Ok(Message::Event { entries, .. }) => entries,
        _ => Vec::new(),
    })
}
