//! RabbitMQ: whether it lets us in, and whether the queue and the exchange are there.

use super::Findings;
use crate::amqp::{AmqpError, Publisher, probe};
use crate::config::{AmqpOrigin, AmqpOutput, Config};

pub(super) async fn check(config: &Config, findings: &mut Findings) {
    if let Some(origin) = &config.amqp_origin {
        queue(origin, findings).await;
    }
    if let Some(output) = &config.amqp_output {
        exchange(output, findings).await;
    }
}

async fn queue(origin: &AmqpOrigin, findings: &mut Findings) {
    let queue = &origin.queue;
    match probe(&origin.server, queue).await {
        Ok(Some(waiting)) => {
            findings.ok("queue", format!("{queue} exists, with {waiting} messages ready"));
        }
        Ok(None) => {
            let found = format!("connected; there is no queue {queue} yet");
            findings.note("queue", found, "nothing to do: it is created at the start, as a durable queue");
        }
        Err(error) => refused(&error, "AMQP_ORIGIN_URL", findings),
    }
}

async fn exchange(output: &AmqpOutput, findings: &mut Findings) {
    let exchange = &output.exchange;
    match Publisher::open(&output.server, exchange, "standpipe check").await {
        Ok(publisher) => {
            publisher.close().await;
            findings.ok("exchange", format!("{exchange} exists"));
        }
        Err(AmqpError::Closed(says)) if says.contains("NOT_FOUND") && says.contains("exchange") => {
            findings.error("exchange", says, "create it, with the type that you want, and bind queues to it");
        }
        Err(error) => refused(&error, "AMQP_OUTPUT_URL", findings),
    }
}

fn refused(error: &AmqpError, variable: &str, findings: &mut Findings) {
    let says = error.to_string();
    let remedy = if says.contains("ACCESS_REFUSED") || says.contains("access to vhost") {
        format!("correct the user, password or virtual host in {variable}; percent-encode special characters")
    } else if matches!(error, AmqpError::Tls(_)) {
        format!("correct cacertfile in {variable}")
    } else {
        format!("start RabbitMQ, or correct the host, port, user or password in {variable}")
    };
    findings.unreachable(says, remedy);
}
