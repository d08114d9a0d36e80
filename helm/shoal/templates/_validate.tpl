{{/* What the schema cannot say is refused here: the value, the limit, the knob. */}}
{{- define "shoal.validate" -}}
{{- $name := include "shoal.name" . }}
{{- $cluster := .Values.cluster }}
{{- if gt (len $name) 47 }}
{{- fail (printf "the name %q has %d characters; KubeRay takes at most 47: choose a shorter release name, or set fullnameOverride" $name (len $name)) }}
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
{{- if not (has $part $names) }}{{ fail (printf "cluster.parts.%s: there is no such part; there are %s" $part (join ", " (slice $names 2))) }}{{ end }}
{{- end }}
{{- include "shoal.validateRollout" (dict "rollout" .Values.rollout "variants" (prepend .Values.variants (dict "name" "stable"))) }}
{{- include "shoal.validateWeights" (dict "weights" .Values.weights "parts" $parts) }}
{{- include "shoal.validateRedis" . }}
{{- include "shoal.validateUpgrade" . }}
{{- range $cluster.env }}
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
{{- with get .engine "pp_layers" }}
{{- if and (kindIs "slice" .) (ne (len .) (int $.pp)) }}
{{- fail (printf "%s: pp_layers names %d stages and pipeline_parallel_size is %d" $.where (len .) (int $.pp)) }}
{{- end }}
{{- end }}
{{- if gt (int .least) (int .most) }}
{{- fail (printf "%s: autoscaling.min_replicas %d is more than max_replicas %d" .where (int .least) (int .most)) }}
{{- end }}
{{- end }}

{{- define "shoal.validateRollout" -}}
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
