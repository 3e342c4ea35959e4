//! RabbitMQ for tests. `make test` unpacks it into `target/tools/rabbitmq`; see `scripts/install-rabbitmq.sh`.

use std::ops::{Deref, DerefMut};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use amqprs::callbacks::ChannelCallback;
use amqprs::channel::{
    BasicConsumeArguments, BasicPublishArguments, Channel, ConfirmSelectArguments, ExchangeDeclareArguments,
    QueueBindArguments, QueueDeclareArguments, QueueDeleteArguments,
};
use amqprs::connection::{Connection, OpenConnectionArguments};
use amqprs::error::Error;
use amqprs::{Ack, BasicProperties, Cancel, CloseChannel, DELIVERY_MODE_PERSISTENT, Nack, Return};
use async_trait::async_trait;
use serde_json::Value;
use standpipe_lab::servers::{PrivateFolder, PrivateRabbitMq};
use tokio::sync::OnceCell;

use super::chain::{RUN, SOON};
use super::{http_request, wait_until};

/// A RabbitMQ that belongs to the test, in a folder that is removed with it. It dereferences to [`PrivateRabbitMq`].
pub struct RabbitMq {
    // Declared before the folder, so that the server is stopped before its files are removed.
    server: PrivateRabbitMq,
    _folder: PrivateFolder,
}

/// A connection with a channel whose messages are confirmed.
pub struct Publisher {
    channel: Channel,
    confirmed: Arc<AtomicU64>,
    published: u64,
    _connection: Connection,
}

struct Confirms(Arc<AtomicU64>);

#[async_trait]
impl ChannelCallback for Confirms {
    async fn close(&mut self, _: &Channel, _: CloseChannel) -> Result<(), Error> {
        Ok(())
    }
    async fn cancel(&mut self, _: &Channel, _: Cancel) -> Result<(), Error> {
        Ok(())
    }
    async fn flow(&mut self, _: &Channel, active: bool) -> Result<bool, Error> {
        Ok(active)
    }
    async fn publish_ack(&mut self, _: &Channel, ack: Ack) {
        // In order, so that each covers all before it.
        self.0.fetch_max(ack.delivery_tag(), Ordering::SeqCst);
    }
    async fn publish_nack(&mut self, _: &Channel, _: Nack) {}
    async fn publish_return(&mut self, _: &Channel, _: Return, _: BasicProperties, _: Vec<u8>) {}
}

impl RabbitMq {
    /// The server that all tests of this binary share, each with queues and exchanges of its own. Never kill or pause it.
    pub async fn shared() -> &'static Self {
        // A static is never dropped: the server and its folder go away with this process.
        static SHARED: OnceCell<RabbitMq> = OnceCell::const_new();
        SHARED.get_or_init(Self::start).await
    }

    /// A server of the test's own.
    pub async fn start() -> Self {
        let unpacked = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools/rabbitmq");
        assert!(unpacked.join("unpacked").exists(), "there is no RabbitMQ: ./scripts/install-rabbitmq.sh");
        let folder = PrivateFolder::create("standpipe-test-rabbitmq").unwrap();
        let server = PrivateRabbitMq::start(folder.path(), &unpacked).await.unwrap();
        Self { server, _folder: folder }
    }

    /// The URL of `AMQP_ORIGIN_URL` and `AMQP_OUTPUT_URL`, with these parameters.
    pub fn url(&self, parameters: &str) -> String {
        format!("amqp://guest:guest@127.0.0.1:{}/?{parameters}", self.port())
    }

    pub async fn connect(&self) -> (Connection, Channel) {
        let to = OpenConnectionArguments::new("127.0.0.1", self.port(), "guest", "guest");
        let connection = Connection::open(&to).await.unwrap();
        let channel = connection.open_channel(None).await.unwrap();
        (connection, channel)
    }

    pub async fn publisher(&self) -> Publisher {
        let (connection, channel) = self.connect().await;
        let confirmed = Arc::new(AtomicU64::new(0));
        channel.register_callback(Confirms(Arc::clone(&confirmed))).await.unwrap();
        channel.confirm_select(ConfirmSelectArguments::new(false)).await.unwrap();
        Publisher { channel, confirmed, published: 0, _connection: connection }
    }

    /// Creates a durable queue.
    pub async fn declare(&self, queue: &str) {
        let (_connection, channel) = self.connect().await;
        channel.queue_declare(QueueDeclareArguments::durable_client_named(queue)).await.unwrap();
    }

    pub async fn delete(&self, queue: &str) {
        let (_connection, channel) = self.connect().await;
        channel.queue_delete(QueueDeleteArguments::new(queue)).await.unwrap();
    }

    /// Creates a durable exchange.
    pub async fn exchange(&self, exchange: &str, kind: &str) {
        let (_connection, channel) = self.connect().await;
        let declare = ExchangeDeclareArguments::new(exchange, kind).durable(true).finish();
        channel.exchange_declare(declare).await.unwrap();
    }

    /// Creates a durable exchange and a durable queue, and binds them.
    pub async fn bind(&self, exchange: &str, kind: &str, queue: &str, key: &str) {
        self.exchange(exchange, kind).await;
        self.declare(queue).await;
        let (_connection, channel) = self.connect().await;
        channel.queue_bind(QueueBindArguments::new(queue, exchange, key)).await.unwrap();
    }

    /// Takes everything out of a queue to which nobody publishes any more.
    pub async fn drain(&self, queue: &str) -> Vec<Vec<u8>> {
        let (_connection, channel) = self.connect().await;
        let ask = QueueDeclareArguments::new(queue).passive(true).finish();
        let (_, count, _) = channel.queue_declare(ask).await.unwrap().unwrap();
        let consume = BasicConsumeArguments::new(queue, "").auto_ack(true).finish();
        let (_, mut messages) = channel.basic_consume_rx(consume).await.unwrap();
        let mut bodies = Vec::new();
        while bodies.len() < count as usize {
            let message = tokio::time::timeout(RUN, messages.recv()).await.expect("nothing comes");
            bodies.push(message.unwrap().content.unwrap_or_default());
        }
        bodies
    }

    /// What the management API says; `Null` if it does not answer.
    pub async fn api(&self, path: &str) -> Value {
        let address = ("127.0.0.1", self.management());
        // guest:guest
        let headers = "Authorization: Basic Z3Vlc3Q6Z3Vlc3Q=\r\n";
        match http_request(address, "GET", path, headers, b"").await {
            Ok((200, body)) => serde_json::from_str(&body).unwrap_or_default(),
            _ => Value::Null,
        }
    }

    /// How many messages of a queue are ready, and how many are taken and not acknowledged, about half a second ago.
    pub async fn depth(&self, queue: &str) -> Option<(u64, u64)> {
        let said = self.api(&format!("/api/queues/%2F/{queue}")).await;
        Some((said["messages_ready"].as_u64()?, said["messages_unacknowledged"].as_u64()?))
    }

    /// Waits until nothing is left in a queue, neither ready nor taken.
    pub async fn is_empty(&self, queue: &str) {
        wait_until("the queue to be empty", RUN, async || self.depth(queue).await == Some((0, 0))).await;
    }
}

impl Publisher {
    /// Publishes messages to the default exchange, and waits until the server has them on its disk.
    pub async fn publish(&mut self, queue: &str, bodies: impl IntoIterator<Item = impl Into<Vec<u8>>>) {
        for body in bodies {
            let persistent = BasicProperties::default().with_delivery_mode(DELIVERY_MODE_PERSISTENT).finish();
            let to = BasicPublishArguments::new("", queue);
            self.channel.basic_publish(persistent, body.into(), to).await.unwrap();
            self.published += 1;
        }
        wait_until("the messages to be confirmed", SOON, async || {
            self.confirmed.load(Ordering::SeqCst) >= self.published
        })
        .await;
    }
}

impl Deref for RabbitMq {
    type Target = PrivateRabbitMq;

    fn deref(&self) -> &PrivateRabbitMq {
        &self.server
    }
}

impl DerefMut for RabbitMq {
    fn deref_mut(&mut self) -> &mut PrivateRabbitMq {
        &mut self.server
    }
}
