{{/* A null takes a default away, and templates would stumble over the hole. */}}
{{- define "shoal.whole" -}}
{{- range $path := list "engine" "router" "server" "variants" "models" "rollout" "image" "image.repository" "image.pullPolicy" "secrets" "weights"
    "weights.source" "weights.path" "weights.hub" "weights.objectStore" "weights.pvc" "weights.cache" "weights.cache.sizeLimit" "cluster"
    "cluster.rayVersion" "cluster.idleTimeoutSeconds" "cluster.deletionDelaySeconds" "cluster.upgrade" "cluster.upgrade.type" "cluster.autoscaler"
    "cluster.head" "cluster.head.resources" "cluster.head.tmpSize" "cluster.router" "cluster.router.resources" "cluster.router.tmpSize"
    "cluster.replica" "cluster.replica.resources" "cluster.replica.tmpSize" "cluster.replica.gpusPerNode" "cluster.replica.gpuResource"
    "cluster.replica.surge" "cluster.parts" "redis" "redis.mode" "redis.external" "redis.image" "redis.tls" "redis.persistence" "redis.maxMemory"
    "service" "service.type" "service.port" "ingress" "httpRoute" "monitoring" "monitoring.port" "monitoring.interval" "networkPolicy"
    "networkPolicy.operator" "networkPolicy.monitoring" "podDisruptionBudget" "serviceAccount" }}
{{- $at := $.Values }}
{{- range splitList "." $path }}
{{- if not (hasKey $at .) }}{{ fail (printf "%s has no value: leave the key out for the chart's own" $path) }}{{ end }}
{{- $at = get $at . }}
{{- end }}
{{- end }}
{{- end }}

{{/* What the schema cannot say is refused here: the value, the limit, the knob. */}}
{{- define "shoal.validate" -}}
{{- $name := include "shoal.name" . }}
{{- $cluster := .Values.cluster }}
{{- if gt (len $name) 47 }}
{{- fail (printf "the name %q has %d characters; KubeRay takes at most 47: choose a shorter release name, or set fullnameOverride" $name (len $name)) }}
{{- end }}
{{- if not (kindIs "string" (printf "name: %s" $name | fromYaml).name) }}
{{- fail (printf "the name %q is no text to YAML: choose another release name, or set fullnameOverride" $name) }}
{{- end }}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $name) }}
{{- fail (printf "the name %q must begin with a letter and have lower-case letters, digits and hyphens only: set fullnameOverride" $name) }}
{{- end }}
{{- $parts := (include "shoal.parts" . | fromJson).parts }}
{{- $names := list "head" "router" }}
{{- range $parts }}
{{- if has .name $names }}{{ fail (printf "%s: the name %q is taken: variants and models have names of their own" .where .name) }}{{ end }}
{{- $names = append $names .name }}
{{- include "shoal.validatePart" . }}
{{- end }}
{{- range $part, $_ := $cluster.parts }}
{{- if not (has $part (slice $names 2)) }}{{ fail (printf "cluster.parts.%s: there is no such part; there are %s" $part (join ", " (slice $names 2))) }}{{ end }}
{{- end }}
{{- include "shoal.validateRollout" (dict "rollout" .Values.rollout "variants" (prepend .Values.variants (dict "name" "stable"))) }}
{{- include "shoal.validateWeights" (dict "weights" .Values.weights "parts" $parts) }}
{{- include "shoal.validateRedis" . }}
{{- include "shoal.validateUpgrade" . }}
{{- include "shoal.validateServed" (dict "parts" $parts "router" .Values.router) }}
{{- $taken := list "RAY_AUTH_TOKEN" "RAY_enable_autoscaler_v2" }}
{{- range include "shoal.ownEnv" (dict "root" . "part" "head") | fromYamlArray }}{{ $taken = append $taken .name }}{{ end }}
{{- range $cluster.env }}
{{- if has .name $taken }}{{ fail (printf "cluster.env has %s, which the chart or KubeRay sets, or which stands there twice: a pod may have it once" .name) }}{{ end }}
{{- $taken = append $taken .name }}
{{- if has .name (list "RAY_REDIS_ADDRESS" "REDIS_PASSWORD" "REDIS_USERNAME" "RAY_external_storage_namespace") }}
{{- fail (printf "cluster.env has %s, which is the other way to make the head's state outlive it: KubeRay takes one; use redis and cluster.gcsFaultTolerance" .name) }}
{{- end }}
{{- end }}
{{- if hasKey $cluster.annotations "ray.io/ft-enabled" }}
{{- fail "cluster.annotations has ray.io/ft-enabled, which is the other way to make the head's state outlive it: use cluster.gcsFaultTolerance" }}
{{- end }}
{{- end }}

{{- define "shoal.validatePart" -}}
{{- $per := int .pods.gpusPerNode }}
{{- if and .gpus (gt (int .tp) $per) }}
{{- fail (printf "%s: tensor_parallel_size %d is more than the %d GPUs of a machine, and a stage does not cross machines: lower it, use pipeline_parallel_size, or set cluster.replica.gpusPerNode" .where (int .tp) $per) }}
{{- end }}
{{- if mod (int .pp) (int .stages) }}
{{- fail (printf "%s: %d stages of %d GPUs do not fill machines of %d GPUs evenly (%d stages each): choose a pipeline_parallel_size that %d divides, or set cluster.replica.gpusPerNode" .where (int .pp) (int .tp) $per (int .stages) (int .stages)) }}
{{- end }}
{{- $block := dig "block_size" 32 .engine | int }}
{{- if not (has $block (list 16 32 64 128 256)) }}{{ fail (printf "%s: block_size is %d, and must be a power of two: 16, 32, 64, 128 or 256" .where $block) }}{{ end }}
{{- with get .engine "pp_layers" }}
{{- if and (kindIs "slice" .) (ne (len .) (int $.pp)) }}
{{- fail (printf "%s: pp_layers names %d stages and pipeline_parallel_size is %d" $.where (len .) (int $.pp)) }}
{{- end }}
{{- end }}
{{- if gt (int .least) (int .most) }}
{{- fail (printf "%s: autoscaling.min_replicas %d is more than max_replicas %d" .where (int .least) (int .most)) }}
{{- end }}
{{- end }}

{{/* Names that clients ask for, and what the ladder falls to. */}}
{{- define "shoal.validateServed" -}}
{{- $owners := dict }}
{{- range .parts }}
{{- if not .variant }}
{{- $part := . }}
{{- $names := .served_model_name }}
{{- if eq .name "stable" }}{{ $names = $.router.served_model_name | default list }}{{ end }}
{{- range $names | default (list (ternary (base .engine.model | trimSuffix ".gguf") .engine.model (hasPrefix "/" .engine.model))) }}
{{- if hasKey $owners . }}
{{- fail (printf "%s: it would be served as %q, as %s is: give it a served_model_name of its own" $part.where . (get $owners .)) }}
{{- end }}
{{- $_ := set $owners . $part.where }}
{{- end }}
{{- end }}
{{- end }}
{{- $last := 0.0 }}
{{- range $i, $rung := .router.ladder }}
{{- $model := $rung.model | default "" }}
{{- if and $model (eq (get $owners $model | default "engine") "engine") }}
{{- fail (printf "router.ladder: there is no other model %q to fall to: add it under models" $model) }}
{{- end }}
{{- if not (or $rung.max_tokens $rung.truncate_to $model $rung.shed) }}{{ fail (printf "router.ladder: the rung at load %v gives nothing up: max_tokens, truncate_to, model or shed" $rung.load) }}{{ end }}
{{- if le (float64 $rung.load) (float64 $last) }}{{ fail (printf "router.ladder: the rung at load %v stands no higher than the one before, at %v" $rung.load $last) }}{{ end }}
{{- $last = $rung.load }}
{{- end }}
{{- $tenants := list }}
{{- range .router.tenants }}
{{- if has .name $tenants }}{{ fail (printf "router.tenants: two tenants have the name %q" .name) }}{{ end }}
{{- $tenants = append $tenants .name }}
{{- end }}
{{- end }}

{{- define "shoal.validateRollout" -}}
{{- $weights := get .rollout "weights" | default dict }}
{{- if and $weights (not (without (values $weights | toStrings) "0")) }}{{ fail "rollout.weights: all are 0: nobody would answer" }}{{ end }}
{{- $names := list }}
{{- range .variants }}{{ $names = append $names .name }}{{ end }}
{{- range $field := list "weights" "shadow" }}
{{- range $name, $_ := get $.rollout $field | default dict }}
{{- if not (has $name $names) }}{{ fail (printf "rollout.%s.%s: there is no such variant; there are %s" $field $name (join ", " $names)) }}{{ end }}
{{- end }}
{{- end }}
{{- end }}

{{- define "shoal.validateWeights" -}}
{{- $weights := .weights }}
{{- range list "/tmp" "/home" "/home/shoal" "/etc/" "/opt/" "/usr/" "/dev/" "/proc/" "/sys/" "/bin/" "/lib/" }}
{{- if or (eq (clean $weights.path) (clean .)) (and (hasSuffix "/" .) (hasPrefix . $weights.path)) }}{{ fail (printf "weights.path is %s, and %s is the pods' own: choose another, such as /models" $weights.path .) }}{{ end }}
{{- end }}
{{- $source := $weights.source }}
{{- if and (eq $source "pvc") (not $weights.pvc.claimName) }}{{ fail "weights.source is pvc: set weights.pvc.claimName" }}{{ end }}
{{- if and (eq $source "objectStore") (not $weights.objectStore.url) }}{{ fail "weights.source is objectStore: set weights.objectStore.url" }}{{ end }}
{{- $url := $weights.objectStore.url }}
{{- if and $url (not (regexMatch "^(s3|gs|azblob)://[^/@?#]+(/[^?#]*)?$" $url)) }}
{{- fail (printf "weights.objectStore.url %q: it must be s3://, gs:// or azblob:// with a bucket and perhaps a prefix" $url) }}
{{- end }}
{{- range .parts }}
{{- $where := .where }}
{{- range (include "shoal.models" (list .) | fromJson).models }}
{{- $below := hasPrefix (printf "%s/" (trimSuffix "/" $weights.path)) . }}
{{- if and (eq $source "objectStore") (not $below) }}
{{- fail (printf "%s: the model %q is not below %s, where weights.objectStore.url is copied to: give its path there, or set weights.source" $where . $weights.path) }}
{{- end }}
{{- if and (eq $source "hub") (not (regexMatch "^[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9_.-]+$" .)) }}
{{- fail (printf "%s: the model %q is no hub id such as org/name: give one, or set weights.source to pvc, objectStore or image" $where .) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- define "shoal.validateRedis" -}}
{{- $redis := .Values.redis }}
{{- if eq $redis.mode "external" }}
{{- if not $redis.external.url }}{{ fail "redis.mode is external: set redis.external.url" }}{{ end }}
{{- if contains "@" $redis.external.url }}{{ fail "redis.external.url has a login in it, and it would be seen by everyone who sees the RayService: put the password into the key redis-password of redis.external.existingSecret" }}{{ end }}
{{- if contains "password=" $redis.external.url }}{{ fail "redis.external.url has a password in it: put it into the key redis-password of redis.external.existingSecret" }}{{ end }}
{{- if and $redis.external.caSecret (not (hasPrefix "rediss" $redis.external.url)) }}{{ fail "redis.external.caSecret is given, and redis.external.url is not rediss://" }}{{ end }}
{{- end }}
{{- if and .Values.cluster.gcsFaultTolerance (eq $redis.mode "external") (not (regexMatch "^rediss?://" $redis.external.url)) }}
{{- fail (printf "cluster.gcsFaultTolerance needs one Redis server, and redis.external.url is %s: set cluster.gcsFaultTolerance to false, or give redis:// or rediss://" $redis.external.url) }}
{{- end }}
{{- end }}

{{- define "shoal.validateUpgrade" -}}
{{- $upgrade := .Values.cluster.upgrade }}
{{- if eq (include "shoal.upgrade" .) "NewClusterWithIncrementalUpgrade" }}
{{- if not $upgrade.gatewayClassName }}{{ fail "cluster.upgrade.type is NewClusterWithIncrementalUpgrade: set cluster.upgrade.gatewayClassName" }}{{ end }}
{{- if gt (int $upgrade.stepSizePercent) (int $upgrade.maxSurgePercent) }}
{{- fail (printf "cluster.upgrade.stepSizePercent %d is more than maxSurgePercent %d" (int $upgrade.stepSizePercent) (int $upgrade.maxSurgePercent)) }}
{{- end }}
{{- if or .Values.ingress.enabled .Values.httpRoute.enabled }}
{{- fail "an incremental upgrade moves requests by a Gateway and HTTPRoute that KubeRay makes itself: turn off ingress.enabled and httpRoute.enabled, or set cluster.upgrade.type to NewCluster" }}
{{- end }}
{{- end }}
{{- if and .Values.httpRoute.enabled (not .Values.httpRoute.parentRefs) }}{{ fail "httpRoute.enabled: name a Gateway in httpRoute.parentRefs" }}{{ end }}
{{- end }}

{{/* The strategy in force. */}}
{{- define "shoal.upgrade" -}}
{{- $upgrade := .Values.cluster.upgrade }}
{{- if ne $upgrade.type "auto" }}{{ $upgrade.type }}
{{- else if and $upgrade.gatewayClassName (.Capabilities.APIVersions.Has "gateway.networking.k8s.io/v1") }}NewClusterWithIncrementalUpgrade
{{- else }}NewCluster
{{- end }}
{{- end }}
