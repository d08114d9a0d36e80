{{/* Serve's declarative config, made as cluster/serve_config.py makes it: what was said, and no defaults. An application's
replicas are replaced when its `args` change; what stands under `deployments` changes in place. */}}
{{- define "shoal.serveConfig" -}}
{{- $parts := (include "shoal.parts" . | fromJson).parts }}
{{- $server := include "shoal.server" . | fromJson }}
{{- $router := mustMergeOverwrite (deepCopy .Values.router) (dict "secret_file" "/etc/shoal/secrets/cluster-secret") }}
{{- if not (dig "allow_anonymous" false .Values.server) }}
{{- $_ := set $router "api_key_file" "/etc/shoal/secrets/api-key" }}
{{- end }}
{{- $named := list }}
{{- $applications := list }}
{{- $surge := dig "max_surge_percent" 100 .Values.server }}
{{- range $parts }}
{{- $entry := dict "name" .name "model" .engine.model }}
{{- if .variant }}{{ $_ := set $entry "variant" true }}{{ end }}
{{- with .served_model_name }}{{ $_ := set $entry "served_model_name" . }}{{ end }}
{{- if and .autoscaling (not .least) }}{{ $_ := set $entry "sleeps" true }}{{ end }}
{{- $named = append $named $entry }}
{{- $deployment := dict "name" "replica" "max_surge_percent" $surge }}
{{- if .autoscaling }}
{{- $_ := set $deployment "autoscaling_config" (include "shoal.autoscaling" . | fromJson) }}
{{- $_ := set $deployment "user_config" (dict "autoscaling" .autoscaling) }}
{{- else }}
{{- $_ := set $deployment "num_replicas" .replicas }}
{{- end }}
{{- $args := dict "part" .name "engine" .engine "router" (pick $router "secret" "secret_file")
    "server" (pick $server "log_format" "drain_timeout_s" "notice") "node_labels" (dict "shoal/part" .name) }}
{{- $applications = append $applications (dict "name" (printf "shoal-%s" .name) "route_prefix" nil
    "import_path" "shoal.cluster.app:build_app" "args" $args "deployments" (list $deployment)) }}
{{- end }}
{{- $args := dict "router" $router "node_labels" (dict "shoal/part" "router")
    "server" (pick $server "metrics_port" "metrics_host" "log_format" "redis_url" "redis_password_file"
    "ingress_drain_timeout_s" "notice" "haproxy") }}
{{- $ingress := dict "name" "ingress" "num_replicas" (dig "ingresses" 1 .Values.server) "max_surge_percent" $surge
    "user_config" (dict "parts" $named "rollout" (.Values.rollout | default dict)) }}
{{- $applications = prepend $applications (dict "name" "shoal" "route_prefix" "/"
    "import_path" "shoal.cluster.app:build_app" "args" $args "deployments" (list $ingress)) }}
{{- dict "proxy_location" "EveryNode" "http_options" (dict "host" $server.host "port" $server.port) "applications" $applications | toYaml }}
{{- end }}

{{/* `server` as the chart settles it, as JSON. */}}
{{- define "shoal.server" -}}
{{- $redis := include "shoal.redis" . | fromJson }}
{{- $ours := dict "host" "0.0.0.0" "port" 8000 "metrics_port" (int .Values.monitoring.port) "metrics_host" "0.0.0.0"
    "redis_url" (include "shoal.redisUrl" .) }}
{{- if $redis.secret }}{{ $_ := set $ours "redis_password_file" "/etc/shoal/redis/password" }}{{ end }}
{{- mustMergeOverwrite (deepCopy .Values.server) $ours | toJson }}
{{- end }}

{{/* Serve's own rules are switched off: the policy has the same in its own terms, by way of the replicas. */}}
{{- define "shoal.autoscaling" -}}
{{- dict "min_replicas" .least "max_replicas" .most "metrics_interval_s" 1.0 "look_back_period_s" 10.0
    "upscale_delay_s" 0.0 "downscale_delay_s" 0.0 "downscale_to_zero_delay_s" 0.0
    "policy" (dict "policy_function" "shoal.cluster.autoscale:ServePolicy") | toJson }}
{{- end }}
