//! Connections to RabbitMQ: the only place that speaks its protocol, AMQP 0-9-1.
//!
//! Any error ends the connection; RabbitMQ then requeues the messages that were delivered and not acknowledged.

use std::collections::BTreeSet;
use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use amqprs::callbacks::{ChannelCallback, ConnectionCallback};
use amqprs::channel::{
    BasicAckArguments, BasicConsumeArguments, BasicPublishArguments, BasicQosArguments, Channel,
    ConfirmSelectArguments, ConsumerMessage, ExchangeDeclareArguments, QueueDeclareArguments,
};
use amqprs::connection::{Connection, OpenConnectionArguments};
use amqprs::error::Error;
use amqprs::tls::TlsAdaptor;
use amqprs::{Ack, BasicProperties, Cancel, Close, CloseChannel, DELIVERY_MODE_PERSISTENT, Nack, Return};
use async_trait::async_trait;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval_at, timeout};
use tokio_rustls::TlsConnector;

use crate::config::AmqpServer;
use crate::directory::tls;
use crate::event::Outgoing;
use crate::mutex::lock;

/// How long RabbitMQ has for an answer.
const ANSWER: Duration = Duration::from_secs(10);
/// Seconds after which a silent peer is considered gone; it takes twice that to notice.
const HEARTBEAT: u16 = 10;
/// How long RabbitMQ has to confirm a close.
const CLOSE: Duration = Duration::from_secs(1);
/// How often the queue is asked how much is in it.
const ASK: Duration = Duration::from_secs(5);
/// How often to look whether the connection is still open.
const LOOK: Duration = Duration::from_millis(500);
/// RabbitMQ's code for something that does not exist.
const NOT_FOUND: u16 = 404;

/// Why a connection is unusable.
#[derive(Debug, thiserror::Error)]
pub enum AmqpError {
    /// It does not answer.
    #[error("RabbitMQ has not answered for {ANSWER:?}")]
    Silent,
    /// It ended the connection, or refused something.
    #[error("RabbitMQ: {0}")]
    Closed(String),
    /// The connection broke, or was never there.
    #[error("{0}")]
    Broken(#[from] Error),
    /// No queue takes a message.
    #[error("no queue takes messages with the routing key {0}: bind one to the exchange")]
    Unroutable(String),
    /// A queue did not take a message.
    #[error("RabbitMQ rejected a message (basic.nack): a queue is full, or could not store it")]
    NotStored,
    /// TLS cannot be used.
    #[error("{0:#}")]
    Tls(anyhow::Error),
}

/// What RabbitMQ said when it closed something.
#[derive(Clone, Default)]
struct Said {
    closed: Arc<Mutex<Option<(u16, String)>>>,
    /// What it says about what was published, for a publisher.
    confirms: Option<mpsc::UnboundedSender<Confirm>>,
}

/// What RabbitMQ says about messages that were published to it.
enum Confirm {
    /// It has this one, or all up to it.
    Stored(u64, bool),
    /// It does not.
    NotStored,
    /// No queue is bound for this routing key.
    Unroutable(String),
}

impl Said {
    fn note(&self, code: u16, text: impl Into<String>) {
        lock(&self.closed).get_or_insert((code, text.into()));
    }

    fn confirm(&self, confirm: Confirm) {
        if let Some(confirms) = &self.confirms {
            let _ = confirms.send(confirm);
        }
    }

    fn is_not_found(&self) -> bool {
        lock(&self.closed).as_ref().is_some_and(|(code, _)| *code == NOT_FOUND)
    }

    /// The error, in RabbitMQ's own words if there are any.
    fn or(&self, error: Error) -> AmqpError {
        lock(&self.closed).clone().map_or(AmqpError::Broken(error), |(_, text)| AmqpError::Closed(text))
    }
}

#[async_trait]
impl ConnectionCallback for Said {
    async fn close(&mut self, _: &Connection, close: Close) -> Result<(), Error> {
        self.note(close.reply_code(), close.reply_text());
        Ok(())
    }

    async fn blocked(&mut self, _: &Connection, _: String) {}

    async fn unblocked(&mut self, _: &Connection) {}

    async fn secret_updated(&mut self, _: &Connection) {}
}

#[async_trait]
impl ChannelCallback for Said {
    async fn close(&mut self, _: &Channel, close: CloseChannel) -> Result<(), Error> {
        self.note(close.reply_code(), close.reply_text());
        Ok(())
    }

    async fn cancel(&mut self, _: &Channel, _: Cancel) -> Result<(), Error> {
        self.note(0, "the queue was deleted, or moved to another node");
        Ok(())
    }

    async fn flow(&mut self, _: &Channel, active: bool) -> Result<bool, Error> {
        Ok(active)
    }

    async fn publish_ack(&mut self, _: &Channel, ack: Ack) {
        self.confirm(Confirm::Stored(ack.delivery_tag(), ack.mutiple()));
    }

    async fn publish_nack(&mut self, _: &Channel, _: Nack) {
        self.confirm(Confirm::NotStored);
    }

    async fn publish_return(&mut self, _: &Channel, returned: Return, _: BasicProperties, _: Vec<u8>) {
        self.confirm(Confirm::Unroutable(returned.routing_key().clone()));
    }
}

/// An open connection with one channel.
struct Link {
    connection: Connection,
    channel: Channel,
    said: Said,
}

/// The answer, if there is one in time.
async fn answer<T>(said: &Said, request: impl Future<Output = Result<T, Error>>) -> Result<T, AmqpError> {
    match timeout(ANSWER, request).await {
        Ok(answer) => answer.map_err(|error| said.or(error)),
        Err(_) => Err(AmqpError::Silent),
    }
}

impl Link {
    async fn open(server: &AmqpServer, name: &str, said: Said) -> Result<Self, AmqpError> {
        let (user, password) = (server.user(), server.password());
        let mut to = OpenConnectionArguments::new(&server.host(), server.port(), &user, &password);
        to.virtual_host(&server.vhost()).connection_name(name).heartbeat(HEARTBEAT);
        if server.is_tls() {
            let trusted = tls::trusting(server.ca(), server.ca().is_none()).map_err(AmqpError::Tls)?;
            to.tls_adaptor(TlsAdaptor::new(TlsConnector::from(Arc::new(trusted)), server.host()));
        }
        let connection = answer(&said, Connection::open(&to)).await?;
        answer(&said, connection.register_callback(said.clone())).await?;
        let channel = Self::channel(&connection, &said).await?;
        Ok(Self { connection, channel, said })
    }

    async fn channel(connection: &Connection, said: &Said) -> Result<Channel, AmqpError> {
        let channel = answer(said, connection.open_channel(None)).await?;
        answer(said, channel.register_callback(said.clone())).await?;
        Ok(channel)
    }

    async fn close(self) {
        let Self { connection, channel, .. } = self;
        let _ = timeout(CLOSE, async {
            let _ = channel.close().await;
            connection.close().await
        })
        .await;
    }

    fn check(&self) -> Result<(), AmqpError> {
        if self.connection.is_open() && self.channel.is_open() && lock(&self.said.closed).is_none() {
            return Ok(());
        }
        Err(self.said.or(Error::NetworkError("the connection is closed".to_owned())))
    }

    /// The number of messages that wait in the queue. Creates a durable one if there is none.
    async fn declare(&mut self, queue: &str) -> Result<u32, AmqpError> {
        match self.depth(queue).await {
            Err(_) if self.said.is_not_found() => {
                // The refusal has closed the channel.
                *lock(&self.said.closed) = None;
                self.channel = Self::channel(&self.connection, &self.said).await?;
                let durable = QueueDeclareArguments::durable_client_named(queue);
                answer(&self.said, self.channel.queue_declare(durable)).await?;
                tracing::info!(queue, "created the queue: it did not exist");
                Ok(0)
            }
            other => other,
        }
    }

    async fn depth(&self, queue: &str) -> Result<u32, AmqpError> {
        let ask = QueueDeclareArguments::new(queue).passive(true).finish();
        let answer = answer(&self.said, self.channel.queue_declare(ask)).await?;
        Ok(answer.map_or(0, |(_, waiting, _)| waiting))
    }
}

/// Connects, and returns the number of messages that wait in a queue; `None` if there is no such queue.
///
/// # Errors
///
/// The server cannot be reached, or refuses.
pub async fn probe(server: &AmqpServer, queue: &str) -> Result<Option<u32>, AmqpError> {
    let link = Link::open(server, "standpipe check", Said::default()).await?;
    let found = match link.depth(queue).await {
        Ok(waiting) => Some(waiting),
        Err(_) if link.said.is_not_found() => None,
        Err(error) => return Err(error),
    };
    link.close().await;
    Ok(found)
}

/// A message.
#[derive(Debug)]
pub struct Delivery {
    /// Its number on this connection.
    pub tag: u64,
    /// Whether it may have been delivered before.
    pub redelivered: bool,
    /// The `message_id` that its sender gave it.
    pub id: Option<String>,
    /// Its content.
    pub body: Vec<u8>,
}

impl From<ConsumerMessage> for Delivery {
    fn from(message: ConsumerMessage) -> Self {
        let (tag, redelivered) =
            message.deliver.map_or((0, false), |deliver| (deliver.delivery_tag(), deliver.redelivered()));
        let id = message.basic_properties.and_then(|about| about.message_id().cloned());
        Self { tag, redelivered, id, body: message.content.unwrap_or_default() }
    }
}

/// A queue from which messages are taken.
pub struct Consumer {
    link: Link,
    queue: String,
    messages: mpsc::UnboundedReceiver<ConsumerMessage>,
    /// How many messages waited in the queue when it was last asked.
    waiting: u32,
    ask: Instant,
}

impl Consumer {
    /// Connects, and begins to take messages, with at most `prefetch` of them unacknowledged. `name` is the connection
    /// name that RabbitMQ shows.
    ///
    /// # Errors
    ///
    /// The server cannot be reached, or refuses.
    pub async fn open(
        server: &AmqpServer,
        queue: &str,
        prefetch: u16,
        name: &str,
    ) -> Result<Self, AmqpError> {
        let mut link = Link::open(server, name, Said::default()).await?;
        let waiting = link.declare(queue).await?;
        answer(&link.said, link.channel.basic_qos(BasicQosArguments::new(0, prefetch, false))).await?;
        let consume = BasicConsumeArguments::new(queue, "").manual_ack(true).finish();
        let (_, messages) = answer(&link.said, link.channel.basic_consume_rx(consume)).await?;
        Ok(Self { link, queue: queue.to_owned(), messages, waiting, ask: Instant::now() + ASK })
    }

    /// How many messages waited in the queue a moment ago, besides those that somebody has taken.
    #[must_use]
    pub fn waiting(&self) -> u32 {
        self.waiting
    }

    /// The next messages: at least one, and more that have already arrived, up to about `bytes` in total. `None` every half second
    /// while there are none.
    ///
    /// # Errors
    ///
    /// The connection is no longer usable.
    pub async fn next(&mut self, bytes: usize) -> Result<Option<Vec<Delivery>>, AmqpError> {
        let mut ticks = interval_at(Instant::now() + LOOK, LOOK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let first = tokio::select! {
            message = self.messages.recv() => {
                let ended = || AmqpError::Broken(Error::NetworkError("the consumer has ended".to_owned()));
                Some(message.ok_or_else(ended)?)
            }
            _ = ticks.tick() => None,
        };
        self.check().await?;
        let Some(first) = first else { return Ok(None) };
        let mut taken = vec![Delivery::from(first)];
        let mut size = taken[0].body.len();
        while size < bytes
            && let Ok(message) = self.messages.try_recv()
        {
            let delivery = Delivery::from(message);
            size += delivery.body.len();
            taken.push(delivery);
        }
        Ok(Some(taken))
    }

    /// Notices that the connection is unusable, and asks from time to time how much waits.
    ///
    /// # Errors
    ///
    /// As for [`Consumer::next`].
    pub async fn check(&mut self) -> Result<(), AmqpError> {
        self.link.check()?;
        if Instant::now() >= self.ask {
            self.waiting = self.link.depth(&self.queue).await?;
            self.ask = Instant::now() + ASK;
        }
        Ok(())
    }

    /// Acknowledges a message and all before it.
    ///
    /// # Errors
    ///
    /// As for [`Consumer::next`].
    pub async fn acknowledge(&self, tag: u64) -> Result<(), AmqpError> {
        answer(&self.link.said, self.link.channel.basic_ack(BasicAckArguments::new(tag, true))).await
    }

    /// Closes the connection: what is not acknowledged goes back to the queue at once.
    pub async fn close(self) {
        self.link.close().await;
    }
}

/// An exchange to which messages are published.
pub struct Publisher {
    link: Link,
    exchange: String,
    confirms: mpsc::UnboundedReceiver<Confirm>,
    /// How many messages were published on this connection.
    published: u64,
}

impl Publisher {
    /// Connects. The exchange must be there: only its owner knows of which type it is to be.
    ///
    /// # Errors
    ///
    /// The server cannot be reached, or refuses.
    pub async fn open(server: &AmqpServer, exchange: &str, name: &str) -> Result<Self, AmqpError> {
        let (tell, confirms) = mpsc::unbounded_channel();
        let said = Said { confirms: Some(tell), ..Said::default() };
        let link = Link::open(server, name, said).await?;
        let ask = ExchangeDeclareArguments::new(exchange, "").passive(true).finish();
        answer(&link.said, link.channel.exchange_declare(ask)).await?;
        answer(&link.said, link.channel.confirm_select(ConfirmSelectArguments::new(false))).await?;
        Ok(Self { link, exchange: exchange.to_owned(), confirms, published: 0 })
    }

    /// Publishes messages in this order, and waits for the publisher confirms of all of them (durable queues have them on disk by
    /// then). There is no time limit, because a published message cannot be recalled.
    ///
    /// # Errors
    ///
    /// Some may have been published. The connection is no longer usable.
    pub async fn publish(&mut self, messages: Vec<Outgoing>) -> Result<(), AmqpError> {
        let mut open = BTreeSet::new();
        for Outgoing { key, id, body } in messages {
            let mut about = BasicProperties::default();
            about
                .with_content_type("application/json")
                .with_delivery_mode(DELIVERY_MODE_PERSISTENT)
                .with_message_id(&id);
            let to = BasicPublishArguments::new(&self.exchange, short(&key)).mandatory(true).finish();
            let mut sent = pin!(self.link.channel.basic_publish(about.finish(), body, to));
            loop {
                tokio::select! {
                    sent = &mut sent => break sent.map_err(|error| self.link.said.or(error))?,
                    () = tokio::time::sleep(LOOK) => self.link.check()?,
                }
            }
            self.published += 1;
            open.insert(self.published);
        }
        while !open.is_empty() {
            let confirm = tokio::select! {
                confirm = self.confirms.recv() => confirm,
                () = tokio::time::sleep(LOOK) => None,
            };
            match confirm {
                Some(Confirm::Stored(tag, false)) => {
                    open.remove(&tag);
                }
                Some(Confirm::Stored(tag, true)) => open = open.split_off(&(tag + 1)),
                Some(Confirm::NotStored) => return Err(AmqpError::NotStored),
                Some(Confirm::Unroutable(key)) => return Err(AmqpError::Unroutable(key)),
                None => self.check()?,
            }
        }
        Ok(())
    }

    /// Notices that the connection is unusable.
    ///
    /// # Errors
    ///
    /// It is unusable.
    pub fn check(&self) -> Result<(), AmqpError> {
        self.link.check()
    }

    /// Closes the connection.
    pub async fn close(self) {
        self.link.close().await;
    }
}

/// A routing key, cut to the length that the protocol allows.
fn short(key: &str) -> &str {
    let mut end = key.len().min(255);
    while !key.is_char_boundary(end) {
        end -= 1;
    }
    &key[..end]
}
