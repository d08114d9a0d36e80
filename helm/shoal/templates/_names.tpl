{{/* Names and labels. KubeRay appends to the RayService's name and must not be cut short: a long one is refused. */}}
{{- define "shoal.name" -}}
{{- if .Values.fullnameOverride }}{{ .Values.fullnameOverride }}
{{- else }}
{{- $chart := .Values.nameOverride | default .Chart.Name }}
{{- if contains $chart .Release.Name }}{{ .Release.Name }}{{ else }}{{ printf "%s-%s" .Release.Name $chart }}{{ end }}
{{- end }}
{{- end }}

{{- define "shoal.labels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{/* Of Ray's pods. KubeRay's own services select by app.kubernetes.io/name, so that one stays KubeRay's. */}}
{{- define "shoal.podLabels" -}}
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
app.kubernetes.io/part-of: {{ .root.Chart.Name }}
shoal/part: {{ .part | quote }}
{{- end }}

{{- define "shoal.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "shoal.secret" -}}
{{ .Values.secrets.existingSecret | default (include "shoal.name" .) }}
{{- end }}

{{- define "shoal.redisHost" -}}
{{ printf "%s.%s.svc" (include "shoal.redisName" .) .Release.Namespace }}
{{- end }}

{{/* Of the StatefulSet: its pods carry it with a hash of ten digits behind in a label, which holds 63 characters. */}}
{{- define "shoal.redisName" -}}
{{ printf "%s-redis" (include "shoal.name" . | trunc 46 | trimSuffix "-") }}
{{- end }}

{{/* Seconds that the answers of a worker's pod may go on for when it is to go. */}}
{{- define "shoal.drain" -}}
{{- $server := .root.Values.server }}
{{- $longest := max (ceil (dig "drain_timeout_s" 30 $server)) (ceil (dig "ingress_drain_timeout_s" 600 $server)) }}
{{- .pods.drainSeconds | default $longest | int }}
{{- end }}

{{/* The Service with the ingresses behind it. */}}
{{- define "shoal.service" -}}
{{ include "shoal.name" . }}{{ if eq (include "shoal.upgrade" .) "NewClusterWithIncrementalUpgrade" }}-routers{{ end }}
{{- end }}
