{{- define "shoal.weightsMount" -}}
name: weights
mountPath: {{ .path }}
{{- if eq .source "pvc" }}
readOnly: true
{{- with .pvc.subPath }}
subPath: {{ . | quote }}
{{- end }}
{{- end }}
{{- end }}

{{- define "shoal.weightsVolume" -}}
- name: weights
  {{- if eq .source "pvc" }}
  persistentVolumeClaim: {claimName: {{ .pvc.claimName | quote }}, readOnly: true}
  {{- else if .cache.claimName }}
  persistentVolumeClaim: {claimName: {{ .cache.claimName | quote }}}
  {{- else }}
  emptyDir: {sizeLimit: {{ .cache.sizeLimit }}}
  {{- end }}
{{- end }}

{{/* The init step that brings models' files to the volume. whole: or else without weights, which ingresses do not read.
Both tools go on where they were stopped, and leave alone what is there. */}}
{{- define "shoal.fetch" -}}
{{- $weights := .root.Values.weights }}
{{- if has $weights.source (list "hub" "objectStore") }}
initContainers:
  - name: weights
    {{- if eq $weights.source "hub" }}
    {{- include "shoal.fetchHub" . | nindent 4 }}
    {{- else }}
    {{- include "shoal.fetchObjects" . | nindent 4 }}
    {{- end }}
    securityContext: {{- include "shoal.containerSecurity" . | nindent 6 }}
    resources:
      requests: {cpu: 500m, memory: 1Gi}
      limits: {memory: 4Gi}
    volumeMounts:
      - {name: weights, mountPath: {{ $weights.path }}}
      - {name: tmp, mountPath: /tmp}
{{- end }}
{{- end }}

{{- define "shoal.fetchHub" -}}
{{- $weights := .root.Values.weights -}}
image: {{ include "shoal.image" .root }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
command: [/bin/sh, -ec]
args:
  - for model in "$@"; do hf download {{ if not .whole }}{{ range list "safetensors" "bin" "pt" "pth" "h5" }}--exclude "*.{{ . }}" {{ end }}{{ end }}"$model"; done
  - weights
  {{- range .models }}
  - {{ . | quote }}
  {{- end }}
env:
  - {name: HOME, value: /tmp}
  - {name: HF_HOME, value: {{ $weights.path | quote }}}
  {{- with $weights.hub.endpoint }}
  - {name: HF_ENDPOINT, value: {{ . | quote }}}
  {{- end }}
  {{- with $weights.hub.existingSecret }}
  - name: HF_TOKEN
    valueFrom: {secretKeyRef: {name: {{ . | quote }}, key: token}}
  {{- end }}
{{- end }}

{{- define "shoal.fetchObjects" -}}
{{- $weights := .root.Values.weights }}
{{- $store := $weights.objectStore }}
{{- $scheme := first (splitList "://" $store.url) }}
{{- $remote := printf "%s,env_auth=true" (get (dict "s3" "s3" "gs" "gcs" "azblob" "azureblob") $scheme) }}
{{- if eq $scheme "s3" }}{{ $remote = printf "%s,provider=%s" $remote (ternary "Other" "AWS" (not (empty $store.endpoint))) }}{{ end }}
{{- with $store.endpoint }}{{ $remote = printf "%s,endpoint='%s'" $remote . }}{{ end }}
{{- with $store.region }}{{ $remote = printf "%s,region=%s" $remote . }}{{ end -}}
image: {{ $store.image }}
command: [/bin/sh, -ec]
args:
  - >-
    remote=$1; shift;
    for model in "$@"; do
    case "$model" in *.gguf) how=copyto;; *) how=copy;; esac;
    rclone --config "" --transfers 16{{ if not .whole }} --exclude "*.safetensors" --exclude "*.bin"{{ end }}
    "$how" "$remote/$model" "$WEIGHTS/$model";
    done
  - weights
  - {{ printf ":%s:%s" $remote (trimSuffix "/" (last (splitList "://" $store.url))) | quote }}
  {{- range .models }}
  - {{ trimPrefix (printf "%s/" (trimSuffix "/" $weights.path)) . | quote }}
  {{- end }}
env:
  - {name: HOME, value: /tmp}
  - {name: WEIGHTS, value: {{ trimSuffix "/" $weights.path | quote }}}
{{- with $store.existingSecret }}
envFrom:
  - secretRef: {name: {{ . | quote }}}
{{- end }}
{{- end }}
