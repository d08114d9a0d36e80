{{/* A pod of Ray's. root; part: head, router or one of the deployment's; pods: how it is to be; gpus; models: whose files
it needs (none for the head); whole: with their weights, or without; readiness: a probe, or nil for KubeRay's. */}}
{{- define "shoal.pod" -}}
{{- $root := .root }}
{{- $values := $root.Values }}
{{- $worker := ne .part "head" -}}
metadata:
  labels: {{- include "shoal.podLabels" . | nindent 4 }}
  {{- with .pods.annotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- if $worker }}
  automountServiceAccountToken: false
  {{- with $values.serviceAccount.name }}
  serviceAccountName: {{ . | quote }}
  {{- end }}
  {{- end }}
  {{- with $values.image.pullSecrets }}
  imagePullSecrets: {{- toYaml . | nindent 4 }}
  {{- end }}
  terminationGracePeriodSeconds: {{ ternary (add (include "shoal.drain" . | int) 30) 30 $worker }}
  securityContext: {{- include "shoal.podSecurity" (dict "id" 1000) | nindent 4 }}
  {{- with .pods.priorityClassName }}
  priorityClassName: {{ . | quote }}
  {{- end }}
  {{- with .pods.runtimeClassName }}
  runtimeClassName: {{ . | quote }}
  {{- end }}
  {{- with .pods.nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .pods.tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .pods.affinity }}
  affinity: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if .pods.topologySpreadConstraints }}
  topologySpreadConstraints:
    {{- range .pods.topologySpreadConstraints }}
    - {{ mustMergeOverwrite (dict "labelSelector" (dict "matchLabels" (include "shoal.podLabels" $ | fromYaml))) (deepCopy .) | toYaml | indent 6 | trim }}
    {{- end }}
  {{- end }}
  {{- with .models }}
  {{- include "shoal.fetch" (dict "root" $root "models" . "whole" $.whole) | trim | nindent 2 }}
  {{- end }}
  containers:
    - name: ray-{{ ternary "worker" "head" $worker }}
      image: {{ include "shoal.image" $root }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      {{- if not $worker }}
      ports:
        - {name: gcs-server, containerPort: 6379}
        - {name: dashboard, containerPort: 8265}
        - {name: client, containerPort: 10001}
        - {name: metrics, containerPort: 8080}
        - {name: serve, containerPort: 8000}
      {{- else if eq .part "router" }}
      ports:
        - {name: metrics, containerPort: 8080}
        - {name: serve, containerPort: 8000}
        - {name: shoal-metrics, containerPort: {{ int $values.monitoring.port }}}
      {{- end }}
      env: {{- include "shoal.env" . | nindent 8 }}
      {{- $resources := deepCopy .pods.resources }}
      {{- if .gpus }}
      {{- $gpus := dict .pods.gpuResource (int .gpus) }}
      {{- $resources = mustMergeOverwrite $resources (dict "requests" $gpus "limits" $gpus) }}
      {{- end }}
      resources: {{- toYaml $resources | nindent 8 }}
      securityContext: {{- include "shoal.containerSecurity" . | nindent 8 }}
      {{- with .readiness }}
      readinessProbe: {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- if $worker }}
      lifecycle:
        preStop:
          exec:
            command: {{ include "shoal.preStop" . }}
      {{- end }}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        - {name: home, mountPath: /home/shoal}
        {{- if $worker }}
        - {name: secrets, mountPath: /etc/shoal/secrets, readOnly: true}
        {{- if ne $values.weights.source "image" }}
        - {{ include "shoal.weightsMount" $values.weights | indent 10 | trim }}
        {{- end }}
        {{- end }}
        {{- if include "shoal.redisFiles" . | trim }}
        - {name: redis, mountPath: /etc/shoal/redis, readOnly: true}
        {{- end }}
  volumes:
    - {name: tmp, emptyDir: {sizeLimit: {{ .pods.tmpSize }}}}
    - {name: home, emptyDir: {sizeLimit: 10Gi}}
    {{- if $worker }}
    - name: secrets
      secret:
        secretName: {{ include "shoal.secret" $root | quote }}
        defaultMode: 288  # 0440
        items:
          - {key: cluster-secret, path: cluster-secret}
          {{- if and (eq .part "router") (not (dig "allow_anonymous" false $values.server)) }}
          - {key: api-key, path: api-key}
          {{- end }}
    {{- if ne $values.weights.source "image" }}
    {{- include "shoal.weightsVolume" $values.weights | nindent 4 }}
    {{- end }}
    {{- else }}
    - {name: autoscaler-tmp, emptyDir: {sizeLimit: 1Gi}}
    {{- end }}
    {{- with include "shoal.redisFiles" . | trim }}
    - name: redis
      projected:
        defaultMode: 288  # 0440
        sources: {{- . | nindent 10 }}
    {{- end }}
{{- end }}

{{/* Of Redis: the password where an ingress reads it, the CA where Ray's head does, too. */}}
{{- define "shoal.redisFiles" -}}
{{- $redis := include "shoal.redis" .root | fromJson }}
{{- if and $redis.secret (eq .part "router") }}
- secret: {name: {{ $redis.secret | quote }}, items: [{key: redis-password, path: password}]}
{{- end }}
{{- if and $redis.ca (has .part (list "head" "router")) }}
- secret: {name: {{ $redis.ca | quote }}, items: [{key: ca.crt, path: ca.crt}]}
{{- end }}
{{- end }}

{{/* cluster/ray_env.py's settings of a node (tests/helm holds them equal), where caches lie, and what was given. */}}
{{- define "shoal.env" -}}
{{- include "shoal.ownEnv" . }}
{{- with .root.Values.cluster.env }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "shoal.ownEnv" -}}
{{- $values := .root.Values }}
{{- $fast := ternary "1" "0" (dig "haproxy" true $values.server) | quote -}}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
- {name: RAY_worker_niceness, value: "0"}
- {name: RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S, value: "30"}
- {name: RAY_AUTH_MODE, value: token}
- {name: RAY_SERVE_THROUGHPUT_OPTIMIZED, value: {{ $fast }}}
- {name: RAY_SERVE_ENABLE_HA_PROXY, value: {{ $fast }}}
- {name: PYTHONSAFEPATH, value: "1"}
{{- if dig "haproxy" true $values.server }}
- {name: RAY_SERVE_HAPROXY_BINARY_PATH, value: /opt/shoal/haproxy}
- {name: RAY_SERVE_HAPROXY_CONFIG_FILE_LOC, value: /tmp/shoal/haproxy.cfg}
- {name: RAY_SERVE_HAPROXY_SOCKET_PATH, value: /tmp/shoal/admin.sock}
- {name: RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH, value: /tmp/shoal/metrics.sock}
- {name: RAY_SERVE_HAPROXY_SERVER_STATE_BASE, value: /tmp/shoal}
- {name: RAY_SERVE_HAPROXY_SERVER_STATE_FILE, value: /tmp/shoal/server-state}
- {name: RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S, value: "3600"}
{{- end }}
- {name: HOME, value: /home/shoal}
- {name: HF_HOME, value: {{ $values.weights.path | quote }}}
- {name: HF_HUB_OFFLINE, value: "1"}
{{- $redis := include "shoal.redis" .root | fromJson }}
{{- if and (eq .part "head") (hasPrefix "rediss" ($redis.url | default "")) }}
- {name: RAY_REDIS_CA_CERT, value: {{ ternary "/etc/shoal/redis/ca.crt" "/etc/ssl/certs/ca-certificates.crt" (not (empty $redis.ca)) }}}
{{- end }}
{{- end }}

{{/* Ray moves everything off the node, and what runs has time to end or to go on elsewhere; the pod gets no new connections
meanwhile. In a hook, as KubeRay starts Ray under a shell that passes no signal on. */}}
{{- define "shoal.preStop" -}}
[shoal, drain-node, --in-s, {{ include "shoal.drain" . | quote }}, --wait]
{{- end }}

{{- define "shoal.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ .id }}
runAsGroup: {{ .id }}
fsGroup: {{ .id }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "shoal.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}
