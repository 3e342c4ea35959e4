//! Kafka: whether it lets us in, and whether the topics are there.

use super::Findings;
use crate::config::{Config, KafkaOrigin, KafkaOutput};
use crate::kafka::{Consumer, KafkaError, Producer};

const NAME: &str = "standpipe-check";

pub(super) async fn check(config: &Config, findings: &mut Findings) {
    if let Some(origin) = &config.kafka_origin {
        taken_from(origin, findings).await;
    }
    if let Some(output) = &config.kafka_output {
        published_to(output, findings).await;
    }
}

async fn taken_from(origin: &KafkaOrigin, findings: &mut Findings) {
    let topic = &origin.topic;
    let found = async {
        let consumer = Consumer::open(&origin.cluster, topic, NAME).await?;
        let found = consumer.topic().await;
        consumer.close().await;
        found
    };
    match found.await {
        Ok(found) => {
            findings.ok("origin", format!("{topic} exists, with {} partitions", found.partitions.len()));
        }
        Err(error) => refused(&error, "origin", "KAFKA_ORIGIN_URL", findings),
    }
}

async fn published_to(output: &KafkaOutput, findings: &mut Findings) {
    match Producer::open(&output.cluster, &output.topic, NAME).await {
        Ok(producer) => {
            producer.close().await;
            findings.ok("output", format!("{} exists", output.topic));
        }
        Err(error) => refused(&error, "output", "KAFKA_OUTPUT_URL", findings),
    }
}

fn refused(error: &KafkaError, what: &'static str, variable: &str, findings: &mut Findings) {
    let says = error.to_string();
    if matches!(error, KafkaError::NoTopic(_)) {
        findings.error(what, says, format!("create it, or correct {variable}"));
    } else {
        findings
            .unreachable(says, format!("start Kafka, or correct the hosts, user or password in {variable}"));
    }
}
