{{/* The parts of a deployment, as in cluster/parts.py: {parts: [{name, engine, replicas, autoscaling, ...}]} as JSON.
Each has its grid cut to machines: `gpus` a pod, on `hosts` machines; and how its pods are to be. */}}
{{- define "shoal.parts" -}}
{{- $root := . }}
{{- $server := .Values.server }}
{{- $said := list (dict "name" "stable" "engine" dict "replicas" (dig "replicas" 1 $server) "autoscaling" .Values.autoscaling "where" "engine" "variant" false) }}
{{- range .Values.variants }}
{{- $said = append $said (merge (dict "where" (printf "variants, %s" .name) "variant" true) .) }}
{{- end }}
{{- range .Values.models }}
{{- $said = append $said (merge (dict "where" (printf "models, %s" .name) "variant" false) .) }}
{{- end }}
{{- $parts := list }}
{{- range $said }}
{{- $engine := mustMergeOverwrite (deepCopy $root.Values.engine) (.engine | default dict) }}
{{- $pods := mustMergeOverwrite (deepCopy $root.Values.cluster.replica) (get $root.Values.cluster.parts .name | default dict) }}
{{- $tp := dig "tensor_parallel_size" 1 $engine | int }}
{{- $pp := dig "pipeline_parallel_size" 1 $engine | int }}
{{- $stages := max 1 (min $pp (div (int $pods.gpusPerNode) $tp)) }}
{{- $autoscaling := .autoscaling | default dict }}
{{- $fixed := .replicas | default 1 | int }}
{{- $least := ternary (dig "min_replicas" 1 $autoscaling | int) $fixed (not (empty $autoscaling)) }}
{{- $most := ternary (dig "max_replicas" 1 $autoscaling | int) $fixed (not (empty $autoscaling)) }}
{{- $parts = append $parts (dict
    "name" .name "where" .where "variant" .variant "engine" $engine "pods" $pods "tp" $tp "pp" $pp
    "served_model_name" (.served_model_name | default list) "replicas" $fixed "autoscaling" $autoscaling
    "gpus" (ternary (mul $tp $stages) 0 (ne (dig "device" "auto" $engine) "cpu")) "hosts" (div (add $pp $stages -1) $stages) "stages" $stages
    "least" $least "most" $most) }}
{{- end }}
{{- dict "parts" $parts | toJson }}
{{- end }}

{{/* All models that a list of parts needs, drafts too, as JSON: {models: [...]}. */}}
{{- define "shoal.models" -}}
{{- $models := list }}
{{- range . }}
{{- $models = append $models .engine.model }}
{{- $draft := dig "speculative_model" "" .engine | default "" }}
{{- if not (has $draft (list "" "ngram")) }}{{ $models = append $models $draft }}{{ end }}
{{- end }}
{{- dict "models" (uniq $models) | toJson }}
{{- end }}
