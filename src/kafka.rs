//! The only place that knows Kafka: partitions to read, at offsets that we keep ourselves, and a topic to publish to.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use krafka::admin::{AlterConsumerGroupOffsetsOptions, TopicPartition};
use krafka::auth::{AuthConfig, TlsConfig};
use krafka::consumer::{AutoOffsetReset, IsolationLevel};
use krafka::error::ErrorCode;
use krafka::producer::{Acks, DeliveryHandle};
use krafka::{CloseOptions, Kafka, KrafkaError, Record};

use crate::config::{KafkaCluster, Sasl};
use crate::event::Outgoing;

/// How long to wait for a broker's answer.
const ANSWER: Duration = Duration::from_secs(10);
/// How long a connection may take.
const CONNECT: Duration = Duration::from_secs(5);
/// How long what is known about the cluster is relied on: where a leader is, and which partitions there are.
const METADATA: Duration = Duration::from_secs(5);
/// A partition whose leader has not answered for so long is silent.
const SILENT: Duration = Duration::from_secs(10);
/// The most bytes that a broker sends at a time, compressed.
const FETCH_BYTES: i32 = 1 << 20;
/// The largest batch of records, not compressed.
const BATCH_BYTES: usize = 32 << 20;
/// The most records handed out at a time, and the most in memory.
const RECORDS: i32 = 500;
const BUFFERED: i32 = 5_000;
/// How long what was not confirmed may still be sent when a connection is given up.
const CLOSE: Duration = Duration::from_secs(1);
/// The largest record that is published: that of the largest commit, as JSON.
const REQUEST_BYTES: usize = 16 << 20;

/// Why Kafka does not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum KafkaError {
    /// These partitions do not have the offsets that were asked for.
    #[error("Kafka has no such offset in partitions {0:?}")]
    NoOffset(Vec<i32>),
    /// There is no such topic.
    #[error("there is no topic {0}")]
    NoTopic(String),
    /// The leaders of these partitions do not answer, or refuse.
    #[error(
        "no records and no answer from partitions {0:?} for {SILENT:?}: they have no leader, or this user may not read them"
    )]
    Silent(Vec<i32>),
    /// A record is larger than Kafka, or the topic, takes.
    #[error("{1}: record {0} is too large (max.message.bytes of the topic)")]
    TooLarge(String, KrafkaError),
    /// Anything else, in the client's words.
    #[error("{0}")]
    Other(KrafkaError),
}

impl From<KrafkaError> for KafkaError {
    fn from(error: KrafkaError) -> Self {
        match error {
            KrafkaError::NoOffset { partitions } => {
                Self::NoOffset(partitions.into_iter().map(|(_, partition)| partition).collect())
            }
            KrafkaError::UnknownTopic { topic } => Self::NoTopic(topic),
            KrafkaError::Broker { code: ErrorCode::UnknownTopicOrPartition, message } => {
                Self::NoTopic(message)
            }
            other => Self::Other(other),
        }
    }
}

/// A result of this module.
pub type KafkaResult<T> = Result<T, KafkaError>;

async fn connect(cluster: &KafkaCluster, name: &str) -> KafkaResult<Kafka> {
    let tls = || match cluster.ca() {
        Some(ca) => TlsConfig::new().with_ca_cert_pem(ca.pem()),
        None => TlsConfig::new().with_native_roots(),
    };
    let login = cluster.login().map(|(sasl, user, password)| match sasl {
        Sasl::Plain => AuthConfig::sasl_plain(user, password),
        Sasl::Scram256 => AuthConfig::sasl_scram_sha256(user, password),
        Sasl::Scram512 => AuthConfig::sasl_scram_sha512(user, password),
    });
    let security = match (login, cluster.is_tls()) {
        (Some(login), true) => login.with_tls(tls()),
        (Some(login), false) => login,
        (None, true) => AuthConfig::ssl(tls()),
        (None, false) => AuthConfig::plaintext(),
    };
    let builder = Kafka::builder(cluster.servers()).client_id(name).security(security);
    // A topic that is missing is reported, not created with the brokers' defaults.
    let builder = builder.request_timeout(ANSWER).connect_timeout(CONNECT).metadata_max_age(METADATA);
    let builder = builder.allow_auto_create_topics(false);
    Ok(builder.connect().await?)
}

/// A record.
#[derive(Clone, Debug)]
pub struct Taken {
    /// Its partition.
    pub partition: i32,
    /// Its place there.
    pub offset: i64,
    /// The number of the leader that wrote it: what tells it from another record that had its place.
    pub epoch: i32,
    /// Its content; `None` for a record that only deletes its key.
    pub body: Option<Bytes>,
}

/// The partitions of a topic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Topic {
    /// What tells it from one of the same name that was there before; empty if the brokers do not say.
    pub id: String,
    /// Its partitions.
    pub partitions: Vec<i32>,
}

/// A topic from which records are taken.
pub struct Consumer {
    kafka: Kafka,
    client: krafka::consumer::Consumer,
    topic: String,
}

impl Consumer {
    /// Connects; nothing is read yet.
    ///
    /// # Errors
    ///
    /// No broker can be reached, or they refuse.
    pub async fn open(cluster: &KafkaCluster, topic: &str, name: &str) -> KafkaResult<Self> {
        let kafka = connect(cluster, name).await?;
        let client = kafka
            .consumer_without_group()
            // Our own offsets, or none: what a broker no longer has must not be skipped in silence.
            .auto_offset_reset(AutoOffsetReset::None)
            .isolation_level(IsolationLevel::ReadCommitted)
            .fetch_max_bytes(FETCH_BYTES)
            .max_poll_records(RECORDS)
            .max_buffered_records(BUFFERED)
            .max_decompressed_size(BATCH_BYTES)
            .lag_staleness_threshold(SILENT)
            .metrics_push(false)
            .build()
            .await?;
        Ok(Self { kafka, client, topic: topic.to_owned() })
    }

    /// The topic as it is now.
    ///
    /// # Errors
    ///
    /// There is none, or no broker can be reached.
    pub async fn topic(&self) -> KafkaResult<Topic> {
        let found = self.client.fetch_metadata(Some(&self.topic)).await?;
        let topic = found.topics.into_iter().find(|topic| topic.name == self.topic);
        let topic = topic.ok_or_else(|| KafkaError::NoTopic(self.topic.clone()))?;
        let mut partitions: Vec<i32> = topic.partitions.keys().copied().collect();
        partitions.sort_unstable();
        let id = if topic.topic_id == [0; 16] {
            String::new()
        } else {
            data_encoding::HEXLOWER.encode(&topic.topic_id)
        };
        Ok(Topic { id, partitions })
    }

    /// The id of the topic, as far as it is known without asking.
    pub async fn known_id(&self) -> Option<String> {
        let found = self.client.fetch_metadata(None).await.ok()?;
        let topic = found.topics.into_iter().find(|topic| topic.name == self.topic)?;
        (topic.topic_id != [0; 16]).then(|| data_encoding::HEXLOWER.encode(&topic.topic_id))
    }

    /// Reads these partitions from these offsets on.
    ///
    /// # Errors
    ///
    /// No broker can be reached.
    pub async fn read_from(&self, places: &BTreeMap<i32, i64>) -> KafkaResult<()> {
        self.client.assign(&self.topic, places.keys().copied().collect()).await?;
        let seeks = places.iter().map(|(partition, offset)| (self.named(*partition), *offset));
        Ok(self.client.seek_many(seeks).await?)
    }

    /// The next records, or none after `wait`.
    ///
    /// # Errors
    ///
    /// [`KafkaError::NoOffset`], or the client cannot go on.
    pub async fn next(&self, wait: Duration) -> KafkaResult<Vec<Taken>> {
        let records = self.client.poll(wait).await?;
        let taken = |record: krafka::ConsumerRecord| Taken {
            partition: record.partition,
            offset: record.offset,
            epoch: record.leader_epoch.unwrap_or(-1),
            body: record.value,
        };
        Ok(records.into_iter().map(taken).collect())
    }

    /// The first offset of a partition, and the one after its last.
    ///
    /// # Errors
    ///
    /// No broker can be reached.
    pub async fn range(&self, partition: i32) -> KafkaResult<(i64, i64)> {
        Ok(self.client.fetch_watermarks(&self.topic, partition).await?)
    }

    /// How many records there are that were not taken yet, as far as that is known; and the partitions that have not answered for
    /// long.
    pub async fn waiting(&self) -> (u64, Vec<i32>) {
        let all = self.client.lag().await;
        let silent = all.iter().filter(|(_, lag)| lag.stale || lag.lag.is_none());
        let mut silent: Vec<i32> = silent.map(|(named, _)| named.partition).collect();
        silent.sort_unstable();
        (all.values().filter_map(|lag| lag.lag).sum(), silent)
    }

    /// Where a partition is: beyond the last record that was handed out, if what follows is none, such as the end of a transaction.
    pub async fn place(&self, partition: i32) -> Option<i64> {
        self.client.position(&self.topic, partition).await
    }

    /// Sets the offsets of a group, for those who watch its lag.
    ///
    /// # Errors
    ///
    /// A broker refuses.
    pub async fn commit(&self, group: &str, places: &BTreeMap<i32, i64>) -> KafkaResult<()> {
        let places = places.iter().map(|(partition, offset)| (self.named(*partition), *offset));
        let options = AlterConsumerGroupOffsetsOptions::default();
        let answers = self.kafka.admin().alter_consumer_group_offsets(group, places, options).await?;
        for answer in answers.into_values() {
            answer?;
        }
        Ok(())
    }

    fn named(&self, partition: i32) -> TopicPartition {
        TopicPartition::new(self.topic.clone(), partition)
    }

    /// Closes the connections.
    pub async fn close(self) {
        let _ = self.client.close_with(CloseOptions::new().timeout(CONNECT)).await;
    }
}

/// A topic to which records are published, each once: Kafka recognises those that are sent again on one connection.
pub struct Producer {
    client: krafka::producer::Producer,
    topic: String,
}

impl Producer {
    /// Connects, and finds the topic.
    ///
    /// # Errors
    ///
    /// There is no such topic, or no broker can be reached.
    pub async fn open(cluster: &KafkaCluster, topic: &str, name: &str) -> KafkaResult<Self> {
        let kafka = connect(cluster, name).await?;
        let client = kafka
            .producer()
            .acks(Acks::All)
            .idempotent(true)
            .linger(Duration::ZERO)
            .max_request_size(REQUEST_BYTES)
            .max_block(ANSWER)
            .delivery_timeout(2 * ANSWER)
            .metrics_push(false)
            .build()
            .await?;
        client.partitions_for(topic).await?;
        Ok(Self { client, topic: topic.to_owned() })
    }

    /// Publishes records, and waits until every one is stored. Those with the same key stay in order.
    ///
    /// # Errors
    ///
    /// Some may not be stored, and others may be.
    pub async fn publish(&self, messages: Vec<Outgoing>) -> KafkaResult<()> {
        let mut sent: Vec<DeliveryHandle> = Vec::with_capacity(messages.len());
        let mut ids = Vec::with_capacity(messages.len());
        for Outgoing { key, id, body } in messages {
            let record = Record::new(self.topic.clone(), body).key(key).header("id", id.clone());
            sent.push(self.client.enqueue(record).await.map_err(|error| refused(error, &id))?);
            ids.push(id);
        }
        for (delivery, id) in sent.into_iter().zip(ids) {
            let _ = delivery.await.map_err(|error| refused(error, &id))?;
        }
        Ok(())
    }

    /// Closes the connections.
    pub async fn close(self) {
        let _ = self.client.close_with(CloseOptions::new().timeout(CLOSE)).await;
    }
}

/// The error, with the record that it is about if that record is what is wrong.
fn refused(error: KrafkaError, id: &str) -> KafkaError {
    match error {
        KrafkaError::Broker { code: ErrorCode::MessageTooLarge | ErrorCode::RecordListTooLarge, .. }
        | KrafkaError::Config { .. } => KafkaError::TooLarge(id.to_owned(), error),
        other => other.into(),
    }
}
