{{/* Which Redis, as JSON: {url, secret, key, ca: {secret, key}}; empty where there is none. */}}
{{- define "shoal.redis" -}}
{{- $redis := .Values.redis }}
{{- if eq $redis.mode "bundled" }}
{{- $scheme := ternary "rediss" "redis" $redis.tls.enabled }}
{{- $ca := ternary (include "shoal.redisTls" .) "" $redis.tls.enabled }}
{{- dict "url" (printf "%s://%s:6379" $scheme (include "shoal.redisHost" .)) "db" "/0" "secret" (include "shoal.secret" .) "ca" $ca | toJson }}
{{- else if eq $redis.mode "external" }}
{{- $external := $redis.external }}
{{- dict "url" $external.url "db" "" "secret" $external.existingSecret "ca" $external.caSecret | toJson }}
{{- else }}{}
{{- end }}
{{- end }}

{{- define "shoal.redisTls" -}}
{{ .Values.redis.tls.existingSecret | default (printf "%s-redis-tls" (include "shoal.name" .)) }}
{{- end }}

{{/* The URL for Shoal: no password in it, and where the CA lies. */}}
{{- define "shoal.redisUrl" -}}
{{- $redis := include "shoal.redis" . | fromJson }}
{{- if not $redis }}none
{{- else if $redis.ca }}
{{- $url := print $redis.url $redis.db }}
{{- printf "%s%sssl_ca_certs=/etc/shoal/redis/ca.crt" $url (ternary "&" "?" (contains "?" $url)) }}
{{- else }}{{ $redis.url }}{{ $redis.db }}
{{- end }}
{{- end }}
