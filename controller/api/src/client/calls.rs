//! One method for each operation of `/v1`.

use reqwest::Method;
use serde::{Serialize, de::DeserializeOwned};

use super::{Client, ClientError, Events, Upgraded, Upload, segment};
use crate::{
    Backup, Blob, ChangeGroup, ChangeTemplate, Command, CommandEvent, CommandQuery, CommandSummary, CommitImage,
    CreateCommand, CreateGroup, CreateTemplate, CreateVms, CreatedVms, Doctor, Download, Estimate, EstimateRequest,
    Event, EventQuery, ExportFormat, ExportQuery, Group, Host, HostMetrics, Image, ImportByPath, ImportQuery, Job,
    JobEvent, JobState, ListQuery, Page, PullImage, STREAM_PROTOCOL, Status, Store, Template, Top, Usage, UsageQuery,
    Vm, VmMetrics, VmQuery, Volume, VolumeMetrics, VolumeQuery,
};

type Answer<T> = Result<T, ClientError>;

impl Client {
    pub async fn status(&self) -> Answer<Status> {
        self.get("/status").read().await
    }
    pub async fn doctor(&self) -> Answer<Doctor> {
        self.get("/doctor").read().await
    }
    pub async fn top(&self) -> Answer<Top> {
        self.get("/top").read().await
    }
    /// The OpenAPI document.
    pub async fn openapi(&self) -> Answer<serde_json::Value> {
        self.get("/openapi.json").read().await
    }

    /// All pages of a list, one after the other.
    async fn all<T: DeserializeOwned>(&self, path: &str, query: &impl Serialize) -> Answer<Vec<T>> {
        let mut items = Vec::new();
        let mut cursor: Option<String> = None;
        loop {
            let mut request = self.get(path).query(query).query(&[("limit", "1000")]);
            if let Some(cursor) = &cursor {
                request = request.query(&[("cursor", cursor)]);
            }
            let page: Page<T> = request.read().await?;
            items.extend(page.items);
            match page.next {
                None => return Ok(items),
                Some(next) => cursor = Some(next),
            }
        }
    }

    // hosts

    pub async fn hosts(&self, query: &ListQuery) -> Answer<Page<Host>> {
        self.get("/hosts").query(query).read().await
    }
    pub async fn all_hosts(&self) -> Answer<Vec<Host>> {
        self.all("/hosts", &()).await
    }
    /// `host`: name or id, here and below.
    pub async fn host(&self, host: &str) -> Answer<Host> {
        self.get(&format!("/hosts/{}", segment(host))).read().await
    }
    /// Forgets a host that is offline and has no VMs.
    pub async fn forget_host(&self, host: &str) -> Answer<()> {
        self.request(Method::DELETE, &format!("/hosts/{}", segment(host))).done().await
    }
    pub async fn host_metrics(&self) -> Answer<Vec<HostMetrics>> {
        self.all("/metrics/hosts", &()).await
    }
    pub async fn stores(&self) -> Answer<Vec<Store>> {
        self.all("/stores", &()).await
    }
    pub async fn store(&self, host: &str) -> Answer<Store> {
        self.get(&format!("/stores/{}", segment(host))).read().await
    }

    // vms

    pub async fn vms(&self, query: &VmQuery) -> Answer<Page<Vm>> {
        self.get("/vms").query(query).read().await
    }
    /// Those that `target` names: names, ids, group paths or hosts; empty: all.
    pub async fn all_vms(&self, target: &[String]) -> Answer<Vec<Vm>> {
        self.all("/vms", &target_query(target)).await
    }
    pub async fn vm(&self, vm: &str) -> Answer<Vm> {
        self.get(&format!("/vms/{}", segment(vm))).read().await
    }
    /// Starts making VMs; the command's verdicts say when they stand.
    pub async fn create_vms(&self, create: &CreateVms, idempotency_key: Option<&str>) -> Answer<CreatedVms> {
        self.post("/vms").idempotent(idempotency_key).json(create).read().await
    }
    /// Starts deleting one VM. Several: the command `delete`.
    pub async fn delete_vm(&self, vm: &str) -> Answer<Command> {
        self.request(Method::DELETE, &format!("/vms/{}", segment(vm))).read().await
    }
    pub async fn vm_metrics(&self) -> Answer<Vec<VmMetrics>> {
        self.all("/metrics/vms", &()).await
    }
    pub async fn volume_metrics(&self, target: &[String]) -> Answer<Vec<VolumeMetrics>> {
        self.all("/metrics/volumes", &target_query(target)).await
    }
    pub async fn volumes(&self, query: &VolumeQuery) -> Answer<Page<Volume>> {
        self.get("/volumes").query(query).read().await
    }
    pub async fn all_volumes(&self, target: &[String]) -> Answer<Vec<Volume>> {
        self.all("/volumes", &target_query(target)).await
    }
    /// A PNG.
    pub async fn screenshot(&self, vm: &str) -> Answer<bytes::Bytes> {
        self.get(&format!("/vms/{}/screenshot", segment(vm))).bytes().await
    }
    /// The serial console: raw bytes both ways.
    pub async fn console(&self, vm: &str) -> Answer<Upgraded> {
        self.upgrade(&format!("/vms/{}/console", segment(vm))).await
    }
    /// VNC (RFB, RFC 6143): raw bytes both ways.
    pub async fn vnc(&self, vm: &str) -> Answer<Upgraded> {
        self.upgrade(&format!("/vms/{}/vnc", segment(vm))).await
    }
    async fn upgrade(&self, path: &str) -> Answer<Upgraded> {
        let endpoint = self.endpoint().to_string();
        let response = self
            .get(path)
            .header("connection", "upgrade")
            .header("upgrade", STREAM_PROTOCOL)
            .streaming()
            .send()
            .await?;
        response.upgrade().await.map_err(|source| ClientError::Transport {
            method: "GET".into(),
            path: path.to_string(),
            endpoint,
            source,
        })
    }

    // groups

    pub async fn groups(&self, query: &ListQuery) -> Answer<Page<Group>> {
        self.get("/groups").query(query).read().await
    }
    pub async fn all_groups(&self) -> Answer<Vec<Group>> {
        self.all("/groups", &()).await
    }
    pub async fn group(&self, path: &str) -> Answer<Group> {
        self.get(&format!("/groups/{}", segment(path))).read().await
    }
    pub async fn create_group(&self, create: &CreateGroup) -> Answer<Group> {
        self.post("/groups").json(create).read().await
    }
    /// `version`: that of the group as read, to be told of a conflict.
    pub async fn change_group(&self, path: &str, change: &ChangeGroup, version: Option<u64>) -> Answer<Group> {
        self.request(Method::PATCH, &format!("/groups/{}", segment(path))).if_match(version).json(change).read().await
    }
    /// Deletes a group and those below it. Members stay what they are.
    pub async fn delete_group(&self, path: &str, version: Option<u64>) -> Answer<()> {
        self.request(Method::DELETE, &format!("/groups/{}", segment(path))).if_match(version).done().await
    }

    // images

    pub async fn images(&self, query: &ListQuery) -> Answer<Page<Image>> {
        self.get("/images").query(query).read().await
    }
    pub async fn all_images(&self) -> Answer<Vec<Image>> {
        self.all("/images", &()).await
    }
    /// `image`: digest, name or name@revision, here and below.
    pub async fn image(&self, image: &str) -> Answer<Image> {
        self.get(&format!("/images/{}", segment(image))).read().await
    }
    /// Sends an image; the job goes on after the last byte was sent.
    pub async fn import_image(&self, query: &ImportQuery, bytes: Upload) -> Answer<Job> {
        self.post("/images").query(query).body(bytes.body).streaming().read().await
    }
    /// The controller reads the file itself. Unix socket only.
    pub async fn import_image_by_path(&self, import: &ImportByPath) -> Answer<Job> {
        self.post("/images/import").json(import).read().await
    }
    pub async fn put_blob(&self, bytes: Upload) -> Answer<Blob> {
        self.post("/blobs").body(bytes.body).streaming().read().await
    }
    pub async fn delete_image(&self, image: &str) -> Answer<()> {
        self.request(Method::DELETE, &format!("/images/{}", segment(image))).done().await
    }
    /// Reads every chunk of an image back and checks it; the job's result is `{"chunks": n, "bytes": n}`.
    pub async fn verify_image(&self, image: &str) -> Answer<Job> {
        self.post(&format!("/images/{}/verify", segment(image))).read().await
    }
    pub async fn estimate_image(&self, image: &str) -> Answer<Estimate> {
        self.get(&format!("/images/{}/estimate", segment(image))).read().await
    }
    /// Of a file the controller can read. Unix socket only.
    pub async fn estimate_file(&self, request: &EstimateRequest) -> Answer<Estimate> {
        self.post("/images/estimate").json(request).streaming().read().await
    }
    /// The image's bytes, in the order of the disk. Each was verified when it was read.
    pub async fn export_image(&self, image: &str, format: ExportFormat) -> Answer<Download> {
        let path = format!("/images/{}/export", segment(image));
        let response = self.get(&path).query(&ExportQuery { format }).streaming().send().await?;
        Ok(Download::new(response, path))
    }
    /// Begins to make a VM's system disk an image; the job's result is the [`Image`].
    pub async fn commit_image(&self, commit: &CommitImage) -> Answer<Job> {
        self.post("/images/commit").json(commit).read().await
    }
    pub async fn pull_image(&self, image: &str, pull: &PullImage, idempotency_key: Option<&str>) -> Answer<Command> {
        self.post(&format!("/images/{}/pull", segment(image))).idempotent(idempotency_key).json(pull).read().await
    }

    // jobs

    pub async fn jobs(&self) -> Answer<Vec<Job>> {
        self.all("/jobs", &()).await
    }
    pub async fn job(&self, id: &str) -> Answer<Job> {
        self.get(&format!("/jobs/{}", segment(id))).read().await
    }
    /// Waits up to `wait_seconds` for a version above `after`.
    pub async fn wait_job(&self, id: &str, after: u64, wait_seconds: u32) -> Answer<Job> {
        self.get(&format!("/jobs/{}", segment(id)))
            .query(&[("after", after), ("wait_seconds", u64::from(wait_seconds))])
            .read()
            .await
    }
    pub async fn job_events(&self, id: &str) -> Answer<Events<JobEvent>> {
        Ok(Events::new(self.get(&format!("/jobs/{}/events", segment(id))).streaming().send().await?))
    }
    /// Follows a job to its end; `progress` sees every change.
    pub async fn follow_job(&self, id: &str, mut progress: impl FnMut(&Job)) -> Answer<Job> {
        let mut after = 0;
        loop {
            let job = self.wait_job(id, after, 20).await?;
            if job.version != after {
                progress(&job);
            }
            if job.state != JobState::Running {
                return Ok(job);
            }
            after = job.version;
        }
    }

    // templates

    pub async fn templates(&self, query: &ListQuery) -> Answer<Page<Template>> {
        self.get("/templates").query(query).read().await
    }
    pub async fn all_templates(&self) -> Answer<Vec<Template>> {
        self.all("/templates", &()).await
    }
    pub async fn template(&self, name: &str) -> Answer<Template> {
        self.get(&format!("/templates/{}", segment(name))).read().await
    }
    pub async fn create_template(&self, create: &CreateTemplate) -> Answer<Template> {
        self.post("/templates").json(create).read().await
    }
    pub async fn change_template(&self, name: &str, change: &ChangeTemplate, version: Option<u64>) -> Answer<Template> {
        self.request(Method::PATCH, &format!("/templates/{}", segment(name)))
            .if_match(version)
            .json(change)
            .read()
            .await
    }
    pub async fn delete_template(&self, name: &str, version: Option<u64>) -> Answer<()> {
        self.request(Method::DELETE, &format!("/templates/{}", segment(name))).if_match(version).done().await
    }

    // backups

    pub async fn backups(&self, query: &VmQuery) -> Answer<Page<Backup>> {
        self.get("/backups").query(query).read().await
    }
    /// Newest first.
    pub async fn all_backups(&self, target: &[String]) -> Answer<Vec<Backup>> {
        self.all("/backups", &target_query(target)).await
    }

    // commands

    /// Gives an order; answers as soon as it is recorded durably.
    pub async fn create_command(&self, create: &CreateCommand, idempotency_key: Option<&str>) -> Answer<Command> {
        self.post("/commands").idempotent(idempotency_key).json(create).read().await
    }
    /// Newest first.
    pub async fn commands(&self, query: &CommandQuery) -> Answer<Page<CommandSummary>> {
        self.get("/commands").query(query).read().await
    }
    pub async fn command(&self, id: &str) -> Answer<Command> {
        self.get(&format!("/commands/{}", segment(id))).read().await
    }
    pub async fn command_events(&self, id: &str) -> Answer<Events<CommandEvent>> {
        Ok(Events::new(self.get(&format!("/commands/{}/events", segment(id))).streaming().send().await?))
    }

    // logs

    pub async fn events(&self, query: &EventQuery) -> Answer<Page<Event>> {
        self.get("/events").query(query).read().await
    }
    pub async fn usage(&self, query: &UsageQuery) -> Answer<Page<Usage>> {
        self.get("/usage").query(query).read().await
    }
}

fn target_query(target: &[String]) -> VmQuery {
    VmQuery { target: (!target.is_empty()).then(|| target.join(",")), cursor: None, limit: None }
}
