//! Metrics: the durations for which the project makes promises, and gauges.

use std::time::Duration;

use bhatti_types::{SandboxState, Thermal};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use crate::Node;

type Labels = [(&'static str, &'static str); 1];
type Durations = Family<Labels, Histogram, fn() -> Histogram>;

/// Creates a histogram with buckets from half a millisecond to a minute.
fn durations() -> Histogram {
    Histogram::new(exponential_buckets(0.0005, 2.0, 18))
}

/// The node's own metrics.
pub(crate) struct Metrics {
    /// From the request until the sandbox can be used, by the sandbox's origin.
    create: Durations,
    /// From asleep to hot, by the previous activity.
    wake: Durations,
    /// The duration of saves.
    pub(crate) save: Histogram,
    /// How long a parent was paused.
    pub(crate) fork_pause: Histogram,
    /// From the request until the command runs, waking included.
    pub(crate) exec_start: Histogram,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        Self {
            create: Family::new_with_constructor(durations),
            wake: Family::new_with_constructor(durations),
            save: durations(),
            fork_pause: durations(),
            exec_start: durations(),
        }
    }

    /// Records a creation. The first word of `origin` becomes the label.
    pub(crate) fn created(&self, origin: &str, took: Duration) {
        let words = ["boot", "template", "sandbox", "snapshot"];
        let origin = words.into_iter().find(|word| origin.starts_with(word)).unwrap_or("other");
        self.create.get_or_create(&[("origin", origin)]).observe(took.as_secs_f64());
    }

    pub(crate) fn woken(&self, from: Thermal, took: Duration) {
        self.wake.get_or_create(&[("from", from.as_str())]).observe(took.as_secs_f64());
    }
}

impl Node {
    /// Adds the node's metrics to a registry.
    pub fn register_metrics(&self, registry: &mut Registry) {
        let Metrics { create, wake, save, fork_pause, exec_start } = &self.shared.metrics;
        registry.register(
            "bhatti_create_seconds",
            "Time from a create request until the sandbox can be used",
            create.clone(),
        );
        registry.register("bhatti_wake_seconds", "Time to wake a sandbox", wake.clone());
        registry.register("bhatti_save_seconds", "Time to save a sandbox's memory", save.clone());
        registry.register(
            "bhatti_fork_pause_seconds",
            "How long a fork or snapshot pauses its parent's processes",
            fork_pause.clone(),
        );
        registry.register(
            "bhatti_exec_start_seconds",
            "Time from an exec request until the command runs",
            exec_start.clone(),
        );
        registry.register_collector(Box::new(Gauges(self.clone())));
    }
}

/// Gauges that are computed at every read.
struct Gauges(Node);

impl std::fmt::Debug for Gauges {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Gauges")
    }
}

impl Collector for Gauges {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let shared = &self.0.shared;
        let (mut hot, mut warm, mut cold, mut stopped, mut other) = (0u64, 0u64, 0u64, 0u64, 0u64);
        for handle in shared.registry.all() {
            *match (handle.access.state(), handle.access.thermal()) {
                (SandboxState::Stopped, _) => &mut stopped,
                (_, Some(Thermal::Hot)) => &mut hot,
                (_, Some(Thermal::Warm)) => &mut warm,
                (_, Some(Thermal::Cold)) => &mut cold,
                (_, None) => &mut other,
            } += 1;
        }
        let mut sandboxes = encoder.encode_descriptor(
            "bhatti_sandboxes",
            "Number of sandboxes by activity",
            None,
            prometheus_client::metrics::MetricType::Gauge,
        )?;
        let counts =
            [("hot", hot), ("warm", warm), ("cold", cold), ("stopped", stopped), ("other", other)];
        for (state, count) in counts {
            let labels = [("state", state)];
            let family = sandboxes.encode_family(&labels)?;
            prometheus_client::encoding::EncodeMetric::encode(&ConstGauge::new(count), family)?;
        }
        let (free, budget) = shared.admission.free_and_budget_mib();
        for (name, help, mib) in [
            ("bhatti_memory_free_mib", "Free memory for further VMs", free),
            ("bhatti_memory_budget_mib", "Memory budget of all VMs", budget),
        ] {
            let metric = ConstGauge::new(mib as u64);
            let gauge = encoder.encode_descriptor(
                name,
                help,
                None,
                prometheus_client::metrics::MetricType::Gauge,
            )?;
            prometheus_client::encoding::EncodeMetric::encode(&metric, gauge)?;
        }
        Ok(())
    }
}
