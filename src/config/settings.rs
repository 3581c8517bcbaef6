//! The table of settings: key, default and meaning. Files, environment and flags all draw their names from it.

/// One setting.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// Where it stands in the file: `admin.listen` is `listen:` under `admin:`.
    pub key: &'static str,
    pub default: &'static str,
    /// What the command line calls its value.
    pub value: &'static str,
    pub help: &'static str,
}

impl Setting {
    /// `admin.listen` is `WARM_ADMIN__LISTEN`.
    pub fn variable(&self) -> String {
        format!("WARM_{}", self.key.replace('.', "__").to_ascii_uppercase())
    }

    /// `admin.listen` is `--admin-listen`.
    pub fn flag(&self) -> String {
        self.key.replace(['.', '_'], "-")
    }
}

const fn setting(key: &'static str, default: &'static str, value: &'static str, help: &'static str) -> Setting {
    Setting { key, default, value, help }
}

/// All settings, in the order in which they are printed.
pub const SETTINGS: &[Setting] = &[
    setting("listen", "127.0.0.1:50051", "ADDR", "where gRPC listens"),
    setting("admin.listen", "127.0.0.1:9464", "ADDR", "where probes and metrics listen"),
    setting("recipe", "", "FILE", "the recipe of the merge; in a file the recipe may stand under `model:` instead"),
    setting("cache_dir", "", "DIR", "where merged weights are kept, so that the next start reads one model; empty: nowhere"),
    setting("cache_max_bytes", "100GiB", "SIZE", "bytes of merged weights that are kept; the least recently used go"),
    setting(
        "ensemble",
        "off",
        "MODE",
        "members for Compare: `resident` (loaded beside the merged model), `spread` (likewise, each on one of the devices alone), `adapters` (likewise, LoRA members of one base, which is loaded once), `streamed` (each loaded for every call, slow), `off`",
    ),
    setting(
        "pooling",
        "",
        "MODE",
        "which token the head reads, over the recipe and the model: last_non_pad, last_token, first_pad_minus_one, cls, mean, or {token: NAME}",
    ),
    setting(
        "head",
        "",
        "YAML",
        "which head counts and how it is read, over the recipe: a name such as `score`, or {tokens: {plus: [...], minus: [...]}, at: ...}",
    ),
    setting(
        "dtype",
        "",
        "TYPE",
        "what merged weights are rounded to, and what a GPU multiplies in: float32, bfloat16, float16 (the CPU computes in float32); empty: as the recipe says",
    ),
    setting(
        "device",
        "auto",
        "DEVICE",
        "where the model runs: auto (the first CUDA device, where there is one, else the CPU), cpu, cuda:0, or several such as [cuda:0, cuda:1], each with the whole model",
    ),
    setting(
        "batch_invariant",
        "off",
        "on|off",
        "whether a score has the same bits in any company on a GPU, too, which is slower there; on the CPU it always has",
    ),
    setting("threads", "auto", "N", "compute threads; auto: one per core"),
    setting("nice", "5", "N", "how far compute threads stand behind all others, from 0 to 19 (Linux): a busy server answers at once"),
    setting("max_tokens", "auto", "N", "the longest sample; auto: as the model's own config says"),
    setting(
        "max_pack_tokens",
        "8192",
        "N",
        "tokens of one forward pass, at most; auto: what is free once the model is loaded has room for, at most 8192 on the CPU and 16384 on a GPU",
    ),
    setting(
        "prefix_cache_bytes",
        "1GiB",
        "SIZE",
        "keys and values of prompts that are kept for samples still to come, of all models of a generation together; off: none",
    ),
    setting("admission.max_requests", "1024", "N", "requests in flight, at most"),
    setting("admission.max_bytes", "1GiB", "SIZE", "bytes of request messages in flight, at most"),
    setting("admission.max_tokens", "4194304", "N", "tokens in flight, at most"),
    setting("admission.max_queue", "65536", "N", "samples in the device's queue, at most"),
    setting(
        "admission.retry_after",
        "1s",
        "TIME",
        "about when a caller that was refused is told to try again, where the wait is not known better",
    ),
    setting("message.max_decode", "64MiB", "SIZE", "the largest request message"),
    setting("message.max_encode", "64MiB", "SIZE", "the largest response message"),
    setting("message.max_samples", "65536", "N", "samples in one request, at most, completions of groups counted"),
    setting("message.max_expanded", "1GiB", "SIZE", "bytes of one request with every completion beside its prompt"),
    setting("stream.window", "64", "N", "requests of one stream that are scored at once"),
    setting("http2.keepalive_interval", "60s", "TIME", "how often an open connection is checked; 0s: never"),
    setting("http2.keepalive_timeout", "20s", "TIME", "how long a connection may take to answer such a check"),
    setting(
        "http2.max_connection_age",
        "0s",
        "TIME",
        "how old a connection may get (give or take a tenth) before its client is asked to make another, which is when it learns of new servers; calls on it end in peace; 0s: any age",
    ),
    setting("drain.delay", "5s", "TIME", "after SIGTERM: how long to keep serving while the news spreads"),
    setting("drain.deadline", "30s", "TIME", "after that: how long requests in flight may take"),
    setting(
        "text.bos",
        "auto",
        "POLICY",
        "begin-of-sequence token: auto (the model's own way, never doubled), always, never, as_is (even doubled)",
    ),
    setting("text.eos", "as_is", "POLICY", "end-of-sequence token: as_is (the model's own way), ensure (append it where it is missing)"),
    setting(
        "text.template",
        "",
        "FILE|NAME",
        "a chat template in place of the model's own: a .jinja file, or the name of one of its templates",
    ),
    setting(
        "text.reasoning",
        "keep",
        "POLICY",
        "thinking blocks of what is judged: keep, strip (one that does not end is a failure of its sample)",
    ),
    setting("text.template_date", "", "DATE", "the date that templates print (YYYY-MM-DD); empty: the day of loading"),
    setting("calibration.mean", "", "X", "the mean raw reward of a reference set; with calibration.std"),
    setting("calibration.std", "", "X", "the standard deviation of raw rewards of a reference set"),
    setting("calibration.samples", "0", "N", "samples in the reference set"),
    setting("calibration.source", "", "TEXT", "what the reference set is"),
    setting(
        "calibration.file",
        "",
        "FILE",
        "what `warm calibrate` wrote for the merged model and each member, or JSON of {mean, std, samples, source}, in place of the four",
    ),
    setting("calibration.from_config", "false", "BOOL", "the mean and std in the config of a single member (OpenRLHF)"),
    setting(
        "swap",
        "beside",
        "WAY",
        "how a reload takes over: beside (needs room for two), in_place (drain, free, load; UNAVAILABLE meanwhile)",
    ),
    setting("activate", "on_load", "WHEN", "when a reload goes live: on_load, on_call (a reload only stages; see `warm activate`)"),
    setting("keep", "1", "N", "generations that are held after they were live, for requests that name their fingerprint"),
    setting("state", "", "DIR", "where the last good recipe is remembered for a restart; empty: nowhere"),
    setting("watch", "off", "on|off", "reload when the recipe, the configuration file or a checkpoint folder changes"),
    setting("watch_interval", "2s", "TIME", "how often the files are looked at"),
    setting("watch_settle", "10s", "TIME", "how long the files must stay as they are before a change counts"),
    setting(
        "watch_marker",
        "",
        "NAME",
        "a file that every checkpoint folder has when it is complete, such as .complete; empty: none is waited for",
    ),
    setting("canary", "", "FILE", "lines of JSON that a new generation is asked before it goes live; empty: the bundled ones"),
    setting("canary_min_rank_correlation", "0.5", "X", "Kendall's tau of a new generation's answers and the live one's, at least"),
    setting("canary_max_mean_shift", "2", "X", "how far their mean may move, in standard deviations of the live answers"),
    setting("canary_max_accuracy_drop", "0.1", "X", "how much of the live accuracy on the file's preferences may be lost"),
    setting("canary_min_accuracy", "0", "X", "accuracy on the file's preferences, at least"),
    setting("shadow.share", "0.01", "SHARE", "the share of prompts that resident members score, too, while the device is idle (0 to 1)"),
    setting("shadow.max_tokens_per_second", "10000", "N", "tokens that are given to members for that, each member's counted"),
    setting("log.format", "text", "FORMAT", "text or json"),
    setting("log.filter", "info", "FILTER", "such as `info` or `warm=debug,info`"),
    setting("log.successes", "0.01", "SHARE", "the share of calls without any failure that are logged (0 to 1); failures always are"),
    setting("log.content", "off", "on|off", "whether the text of samples, and words of errors that may quote it, may be logged"),
    setting(
        "download.max_bytes",
        "500GB",
        "SIZE",
        "bytes of one checkpoint that may be downloaded (member paths `hf:...`, `s3://...`, `gs://...`, `az://...`)",
    ),
    setting("traces.endpoint", "", "URL", "a collector of traces (OTLP over gRPC), such as http://127.0.0.1:4317; empty: no traces"),
    setting("traces.share", "0.01", "SHARE", "the share of traces that begin here and are kept; a caller's own decision is kept to"),
    setting(
        "tenants",
        "",
        "NAMES",
        "tenants counted by themselves, by commas, at most 32, others as `other`; empty: the first 32 that call",
    ),
];

/// The variable that names the configuration file, where no flag does.
pub const FILE_VARIABLE: &str = "WARM_CONFIG";

/// The setting of this key.
pub fn find(key: &str) -> Option<&'static Setting> {
    SETTINGS.iter().find(|setting| setting.key == key)
}
